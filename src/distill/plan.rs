//! The plan of a run with `degrade.nodes = "auto"`: what stage 1 measures decides how long it is, which nodes are kept and how long each
//! is the target.
//!
//! Stage 1 teaches the fake score the student's first samples, and that is worth as much as the time that the fake score would need for it
//! in stage 2. How far it has come can be told without knowing where it will end. Let T be the teacher, E the best denoiser of the
//! student's samples, and F the copy on its way from T to E, `F = T + k (E - T)` at a given x_t. Since `E[<h(x_t), E(x_t) - x>] = 0` for any h,
//!
//! ```text
//! gap      G = E lambda |T - F|^2                  = k^2        E lambda |T - E|^2
//! mismatch M = E lambda (|T - x|^2 - |F - x|^2)    = k (2 - k)  E lambda |T - E|^2,   so   k = 2 G / (G + M).
//! ```
//!
//! `k` is below 1 where the copy still lags, and 1 where it is the score of the student's samples. The same number is measured of the fake
//! score in stage 2 (`tracking` in `metrics.jsonl`).

use crate::distill::config::{Config, NodeCount};
use crate::distill::cost::passes;
use crate::distill::trajectory::Node;
use crate::shown::counted;

/// Stage 1 does not end before the copy has come so far.
const ENOUGH: f64 = 0.75;
/// Nor while its loss still falls by more than this share of what it has fallen in all from one look to the next.
const STILL_FALLING: f64 = 0.1;
/// Share of the forward passes of a whole run that stage 1 may cost.
const SHARE: f64 = 0.08;
/// Samples of a look, at least: of few the distance of two losses cannot be told from chance.
const SAMPLES: usize = 64;
/// The first look, and the factor by which the steps grow from one look to the next.
const FIRST: u64 = 2;
const GROWTH: f64 = 1.6;
/// Share of stage 1's steps for which all nodes before the teacher together are the target.
const HELD: f64 = 0.3;
/// A node is recorded where the copy has come so much farther than at the last.
const FARTHER: f64 = 0.15;
/// Where the teacher's loss on the student's samples is above the copy's by less than this share, there is nothing to record.
const LITTLE: f64 = 0.01;

/// The share of the way from the target to the student's own score that the fake score has gone, from the means of the gap `G` and the
/// mismatch `M` of the module's text: 1 where it follows, less where it lags, more where it is beyond. `None` where there is nothing
/// to follow yet or what there is cannot be told from chance (`G + M` is not above 0).
pub fn tracking(gap: f64, mismatch: f64) -> Option<f64> {
    let whole = gap + mismatch;
    (whole > 0.0 && whole.is_finite()).then(|| 2.0 * gap / whole)
}

/// What a look of stage 1 says of a node: [`tracking`] of the copy, the teacher as the target. `None` for the teacher itself.
pub fn tracking_of(teacher: &Node, node: &Node) -> Option<f64> {
    let (gap, before, now) = (node.gap?, teacher.loss?, node.loss?);
    tracking(f64::from(gap), f64::from(before) - f64::from(now))
}

/// Steps that stage 1 may have: `degrade.steps`, and no more than that share of the forward passes of the run, looks included; but as many
/// as there may be nodes.
pub fn most_steps(config: &Config) -> u64 {
    let p = passes(config);
    let stage_two = (config.backtrack.updates * p.of_update(config.backtrack.ratio)) as f64;
    let paid = stage_two * SHARE / (1.0 - SHARE);
    let look = samples_of_a_look(config);
    let (mut steps, mut spent) = (0, look);
    while steps < config.degrade.steps {
        spent += p.degrade + if is_look(steps + 1) { look } else { 0 };
        if spent as f64 > paid {
            break;
        }
        steps += 1;
    }
    steps.max(NodeCount::AUTO_MOST as u64)
}

/// Steps of stage 1, or with `degrade.nodes = "auto"` as many as it may have.
pub fn steps(config: &Config) -> u64 {
    match config.degrade.nodes {
        NodeCount::Count(0) => 0,
        NodeCount::Count(_) => config.degrade.steps,
        NodeCount::Auto => most_steps(config),
    }
}

/// What keeps stage 1 from taking more steps than [`most_steps`], for people.
pub fn limit(config: &Config) -> String {
    if most_steps(config) >= config.degrade.steps {
        format!("degrade.steps is {}", config.degrade.steps)
    } else {
        format!(
            "stage 1 may cost {:.0} % of the run's forward passes, and backtrack.updates is {}",
            100.0 * SHARE,
            config.backtrack.updates
        )
    }
}

/// Forward passes that are left for stage 2 of a budget for both.
pub fn left_for_stage_two(budget: u64) -> u64 {
    (budget as f64 * (1.0 - SHARE)) as u64
}

/// Whether stage 1 looks at the copy after `step` steps, of `steps` at most.
pub fn looks_after(step: u64, steps: u64) -> bool {
    is_look(step) || step == steps
}

/// Whether `step` is one of the steps after which there is a look, each so much later than the one before.
fn is_look(step: u64) -> bool {
    let mut at = FIRST;
    while at < step {
        at = (at as f64 * GROWTH).ceil() as u64;
    }
    at == step
}

/// Batches of `batch` samples in a look.
pub fn batches_of_a_look(batch: usize) -> usize {
    SAMPLES.div_ceil(batch.max(1))
}

/// Samples of a look.
fn samples_of_a_look(config: &Config) -> u64 {
    (batches_of_a_look(config.batch) * config.batch) as u64
}

/// Forward passes, in images, of the looks of a stage 1 that has ended after `done` steps: one of the copy for each, and one of the teacher.
pub fn passes_of_looks(config: &Config, done: u64) -> u64 {
    if !config.degrade.nodes.is_auto() || done == 0 {
        return 0;
    }
    let looks = (1..=done).filter(|step| is_look(*step) || *step == done).count() as u64;
    (looks + 1) * samples_of_a_look(config)
}

/// What stage 1 does after a look at its copy, whose node this would be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Look {
    /// It becomes a node, or a candidate of one.
    pub record: bool,
    /// Stage 1 ends.
    pub end: bool,
}

/// Decides after a look: `nodes` are those recorded so far, `seen` is the copy as it is now, `before` its loss at the look before.
pub fn after_look(nodes: &[Node], seen: &Node, before: Option<f32>, steps: u64) -> Look {
    let teacher = &nodes[0];
    let now = tracking_of(teacher, seen).unwrap_or_default();
    let last = nodes.last().and_then(|n| tracking_of(teacher, n)).unwrap_or_default();
    let loss = |loss: Option<f32>| f64::from(loss.unwrap_or(f32::INFINITY));
    let fallen = loss(teacher.loss) - loss(seen.loss);
    let falling = loss(before.or(teacher.loss)) - loss(seen.loss) > STILL_FALLING * fallen;
    let end = now >= ENOUGH && !falling || seen.iteration >= steps;
    Look { record: end || now >= last + FARTHER, end }
}

/// What comes of stage 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The candidates that are kept, rising, the teacher first. The teacher alone: there is no trajectory.
    pub nodes: Vec<usize>,
    /// The reasons, for people.
    pub why: String,
}

/// The nodes that are kept of the candidates of stage 1: the last, and up to two before it at equal distances from the teacher (the
/// square root of the gap). `most`: so many of them; `steps`: as many could have been taken, for the reason `limit`.
pub fn choose(candidates: &[Node], most: usize, steps: u64, limit: &str) -> Plan {
    let (teacher, last) = (&candidates[0], candidates.len() - 1);
    let end = &candidates[last];
    let loss = |node: &Node| f64::from(node.loss.unwrap_or_default());
    let fall = (loss(teacher) - loss(end)) / loss(teacher).max(f64::MIN_POSITIVE);
    if last == 0 || fall < LITTLE {
        let capped = if end.iteration < steps { String::new() } else { format!(" (no more steps: {limit})") };
        let why = format!(
            "no trajectory: after {}{capped} the loss on the student's samples is {:.1} % below the teacher's. Either the teacher \
             already denoises them about as well as a score of their own, or the copy learns too slowly for so few steps (degrade.lr)",
            counted(end.iteration, "step"),
            100.0 * fall.max(0.0)
        );
        return Plan { nodes: vec![0], why };
    }
    let distance = |k: usize| f64::from(candidates[k].gap.unwrap_or_default()).max(0.0).sqrt();
    let count = most.min(last);
    let mut nodes = vec![0];
    for k in 1..count {
        let ideal = distance(last) * k as f64 / count as f64;
        let first = nodes[k - 1] + 1;
        let nearest = (first..=last - (count - k))
            .min_by(|&a, &b| (distance(a) - ideal).abs().total_cmp(&(distance(b) - ideal).abs()))
            .unwrap_or(first);
        nodes.push(nearest);
    }
    nodes.push(last);
    let come = tracking_of(teacher, end).unwrap_or_default();
    let ended = if end.iteration < steps {
        "and its loss has stopped falling".to_owned()
    } else {
        format!("and it may take no more steps ({limit})")
    };
    let hold = hold(end.iteration, count);
    let targets = match count {
        1 => "the teacher is the target from the first update on".to_owned(),
        _ => format!(
            "before the teacher, {} the target for {} each",
            if count == 2 { "one node is".to_owned() } else { format!("{} nodes are", count - 1) },
            counted(hold, "update")
        ),
    };
    let why = format!(
        "stage 1 took {}: the copy has come {:.0} % of the way from the teacher to the score of the student's first samples, {ended}; \
         {targets}",
        counted(end.iteration, "step"),
        100.0 * come.min(1.0),
    );
    Plan { nodes, why }
}

/// Generator updates for which each node before the teacher is the target, after a stage 1 of so many steps. (Where they stayed longer, the
/// lead of stage 1 was lost: examples/convergence.)
pub fn hold(steps: u64, nodes: usize) -> u64 {
    let before_teacher = nodes.saturating_sub(1).max(1);
    ((steps as f64 * HELD / before_teacher as f64).ceil() as u64).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(index: usize, iteration: u64, loss: f32, gap: f32) -> Node {
        let gap = (index > 0).then_some(gap);
        Node { index, file: String::new(), iteration, loss: Some(loss), hash: String::new(), gap }
    }

    /// A copy that has come `k` of the way, where the teacher's excess is 1 over a best loss of 0.5.
    fn at(index: usize, iteration: u64, k: f32) -> Node {
        node(index, iteration, 1.5 - k * (2.0 - k), k * k)
    }

    #[test]
    fn tracking_is_the_share_of_the_way() {
        for k in [0.1, 0.5, 0.9, 1.0, 1.3] {
            let found = tracking_of(&at(0, 0, 0.0), &at(1, 3, k)).unwrap();
            assert!((found - f64::from(k)).abs() < 1e-5, "{k}: {found}");
        }
        assert_eq!(tracking_of(&at(0, 0, 0.0), &at(0, 0, 0.0)), None);
        assert_eq!((tracking(1.0, -2.0), tracking(0.0, 0.0), tracking(f64::NAN, 1.0)), (None, None, None));
    }

    #[test]
    fn stage_one_ends_when_the_copy_has_come_far_enough() {
        let nodes = [at(0, 0, 0.0), at(1, 2, 0.2)];
        let before = |k: f64| Some((1.5 - k * (2.0 - k)) as f32);
        let look = |k, earlier, iteration| after_look(&nodes, &at(2, iteration, k), before(earlier), 40);
        assert_eq!(look(0.3, 0.2, 4), Look { record: false, end: false });
        assert_eq!(look(0.4, 0.2, 4), Look { record: true, end: false });
        // Far enough, but the loss has fallen from 0.75 to 0.54 of an excess of 1, then from 0.58 to 0.54.
        assert_eq!(look(0.8, 0.5, 7), Look { record: true, end: false });
        assert_eq!(look(0.8, 0.75, 7), Look { record: true, end: true });
        assert_eq!(look(0.1, 0.05, 40), Look { record: true, end: true });
        let looks: Vec<u64> = (1..=40).filter(|s| looks_after(*s, 40)).collect();
        assert_eq!(looks, [2, 4, 7, 12, 20, 32, 40]);
    }

    #[test]
    fn nodes_lie_at_equal_distances_from_the_teacher() {
        let ks = [0.0, 0.2, 0.3, 0.45, 0.62, 0.9];
        let candidates: Vec<Node> = ks.iter().enumerate().map(|(i, k)| at(i, 4 * i as u64, *k)).collect();
        let plan = choose(&candidates, 3, 100, "degrade.steps is 100");
        assert_eq!(plan.nodes, [0, 2, 4, 5]);
        assert!(
            plan.why.contains("20 steps") && plan.why.contains("90 %") && plan.why.contains("3 updates each"),
            "{}",
            plan.why
        );
        assert_eq!(choose(&candidates[..2], 3, 4, "").nodes, [0, 1]);
        // The copy is no better than the teacher: nothing to record.
        let plan = choose(&[at(0, 0, 0.0), node(1, 9, 1.499, 1e-4)], 3, 9, "degrade.steps is 9");
        assert_eq!(plan.nodes, [0]);
        assert!(
            plan.why.starts_with("no trajectory: after 9 steps (no more steps: degrade.steps is 9) the loss"),
            "{}",
            plan.why
        );
    }

    #[test]
    fn stage_one_costs_so_much_of_the_run_at_most() {
        let sets = ["batch=4", "backtrack.updates=184", "degrade.nodes=auto"].map(String::from);
        let config = Config::resolve(None, &sets).unwrap();
        // 184 updates of 16 passes are 2944, of 3200 in all: 256 for stage 1. A step is 8, a look 64: that of the teacher, and after 2, 4 and
        // 7 steps.
        assert_eq!(left_for_stage_two(3200), 2944);
        let steps = most_steps(&config);
        assert!(8 * steps + 64 * 3 <= 256 && 8 * (steps + 1) + 64 * (3 + u64::from(steps + 1 == 7)) > 256, "{steps}");
        // Looks after 2, 4, 7 and, since it is the end, 11 steps, of 16 batches of 4 samples; and one of the teacher.
        assert_eq!((batches_of_a_look(4), batches_of_a_look(200), passes_of_looks(&config, 11)), (16, 1, 5 * 64));
        let few = Config::resolve(None, &[&sets[..], &["degrade.steps=5".into()]].concat()).unwrap();
        assert_eq!((most_steps(&few), limit(&few).as_str()), (5, "degrade.steps is 5"));
        assert_eq!(limit(&config), "stage 1 may cost 8 % of the run's forward passes, and backtrack.updates is 184");
    }
}
