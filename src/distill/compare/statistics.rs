//! What two sets of curves say about each other.

use serde::{Deserialize, Serialize};

use super::{Curve, Point};
use crate::error::{Error, Result};

/// A mean over seeds with its 95 % confidence interval (Student's t); without an interval where there is one seed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// Mean over the seeds.
    pub mean: f64,
    /// Lower end of the interval; absent for one seed.
    pub low: Option<f64>,
    /// Upper end of the interval; absent for one seed.
    pub high: Option<f64>,
}

impl Interval {
    /// The mean and interval of these values, one a seed.
    pub fn of(values: &[f64]) -> Self {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        if values.len() < 2 {
            return Self { mean, low: None, high: None };
        }
        let sd = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
        let half = t95(values.len() - 1) * sd / n.sqrt();
        Self { mean, low: Some(mean - half), high: Some(mean + half) }
    }
}

impl std::fmt::Display for Interval {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.low, self.high) {
            (Some(low), Some(high)) => write!(f, "{:.2} [{low:.2}, {high:.2}]", self.mean),
            _ => write!(f, "{:.2}", self.mean),
        }
    }
}

/// 97.5 % quantile of Student's t.
fn t95(freedom: usize) -> f64 {
    const TABLE: [f64; 12] = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179];
    // Beyond the table: Cornish-Fisher, good to three digits there.
    TABLE.get(freedom.wrapping_sub(1)).copied().unwrap_or_else(|| {
        let (z, v) = (1.959_964_f64, freedom as f64);
        z + (z.powi(3) + z) / (4.0 * v) + (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / (96.0 * v * v)
    })
}

/// Where one seed's run with the trajectory came down to the level that its base method ended with, as shares of what
/// the base method spent in all. Linear between two measurements.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Reached {
    /// Seed of both runs.
    pub seed: u64,
    /// Mean distance of the last fifth of the measurements of the base method.
    pub base: f64,
    /// Mean distance of the last fifth of the measurements with the trajectory.
    pub trajectory: f64,
    /// Share of the base method's generator updates, below 1 where the trajectory is faster; `None`: never.
    pub updates: Option<f64>,
    /// The same share of the forward passes, stage 1 included; `None`: never.
    pub forwards: Option<f64>,
    /// The same share of the seconds, stage 1 included; `None`: never.
    pub seconds: Option<f64>,
    /// The same for the base method itself: below 1 where it had come down before its end.
    pub base_updates: f64,
    /// Generator updates with the trajectory over those of the base method, both counted until the distance is reached
    /// that the base method has after a quarter of its updates; `None`: never.
    pub early_updates: Option<f64>,
    /// The same ratio of forward passes, stage 1 included; `None`: never.
    pub early_forwards: Option<f64>,
}

/// The whole comparison.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Comparison {
    /// Each seed's pair of runs.
    pub seeds: Vec<Reached>,
    /// Final distance of the base method.
    pub base: Interval,
    /// Final distance with the trajectory.
    pub trajectory: Interval,
    /// Final distance with the trajectory over that without, seed by seed.
    pub final_ratio: Interval,
    /// [`Reached::updates`] over the seeds; `None` where a seed never came down to the base method's level.
    pub updates: Option<Interval>,
    /// [`Reached::forwards`] over the seeds; `None` as for `updates`.
    pub forwards: Option<Interval>,
    /// [`Reached::seconds`] over the seeds; `None` as for `updates`.
    pub seconds: Option<Interval>,
    /// [`Reached::base_updates`] over the seeds.
    pub base_updates: Interval,
    /// [`Reached::early_updates`] over the seeds; `None` where it is for any seed.
    pub early_updates: Option<Interval>,
    /// [`Reached::early_forwards`] over the seeds; `None` where it is for any seed.
    pub early_forwards: Option<Interval>,
    /// One sentence for people: whether the trajectory pays, and by how much.
    pub verdict: String,
}

/// The distance at the end: the mean over the last fifth of the looks, for one alone is noisy.
pub(super) fn level(points: &[Point]) -> f64 {
    let last = &points[points.len() - (points.len() / 5).max(1)..];
    last.iter().map(|p| p.distance).sum::<f64>() / last.len() as f64
}

/// The first place, by `x`, at which the curve is at or below `level`.
fn crossing(points: &[Point], level: f64, x: impl Fn(&Point) -> f64) -> Option<f64> {
    let at = points.iter().position(|p| p.distance <= level)?;
    let Some(before) = at.checked_sub(1).map(|k| &points[k]) else { return Some(x(&points[at])) };
    let share = (before.distance - level) / (before.distance - points[at].distance);
    Some(x(before) + share.clamp(0.0, 1.0) * (x(&points[at]) - x(before)))
}

/// Pairs the curves by seed.
pub fn compare(base: &[Curve], trajectory: &[Curve]) -> Result<Comparison> {
    let mut seeds = Vec::new();
    for b in base {
        let Some(t) = trajectory.iter().find(|t| t.seed == b.seed) else { continue };
        let (Some(end), false) = (b.points.last(), t.points.is_empty()) else { continue };
        let goal = level(&b.points);
        let share = |x: fn(&Point) -> f64| crossing(&t.points, goal, x).map(|v| v / x(end).max(f64::MIN_POSITIVE));
        // The look nearest to a quarter of the updates, and what either arm spent to come down to its distance.
        let quarter = |p: &&Point| (4 * p.updates).abs_diff(end.updates);
        let early = b.points.iter().min_by_key(quarter).map_or(goal, |p| p.distance);
        let early_share =
            |x: fn(&Point) -> f64| Some(crossing(&t.points, early, x)? / crossing(&b.points, early, x)?.max(1.0));
        seeds.push(Reached {
            seed: b.seed,
            base: goal,
            trajectory: level(&t.points),
            updates: share(|p| p.updates as f64),
            forwards: share(|p| p.forwards as f64),
            seconds: share(|p| p.seconds),
            base_updates: crossing(&b.points, goal, |p| p.updates as f64).unwrap_or(end.updates as f64)
                / (end.updates as f64).max(1.0),
            early_updates: early_share(|p| p.updates as f64),
            early_forwards: early_share(|p| p.forwards as f64),
        });
    }
    if seeds.is_empty() {
        return Err(Error::usage("no seed has a run with and a run without the trajectory"));
    }
    let all = |f: &dyn Fn(&Reached) -> f64| Interval::of(&seeds.iter().map(f).collect::<Vec<_>>());
    let reached =
        |f: fn(&Reached) -> Option<f64>| seeds.iter().map(f).collect::<Option<Vec<f64>>>().map(|v| Interval::of(&v));
    let mut comparison = Comparison {
        base: all(&|s| s.base),
        trajectory: all(&|s| s.trajectory),
        final_ratio: all(&|s| s.trajectory / s.base),
        updates: reached(|s| s.updates),
        forwards: reached(|s| s.forwards),
        seconds: reached(|s| s.seconds),
        base_updates: all(&|s| s.base_updates),
        early_updates: reached(|s| s.early_updates),
        early_forwards: reached(|s| s.early_forwards),
        verdict: String::new(),
        seeds,
    };
    // Runs end at whole updates: a hundredth more is the same budget.
    let spent = |c: &Curve| c.points.last().map_or(0, |p| p.forwards) as f64;
    let no_more = comparison.seeds.iter().all(|s| {
        let of = |curves: &[Curve]| curves.iter().find(|c| c.seed == s.seed).map_or(0.0, spent);
        of(trajectory) <= 1.01 * of(base)
    });
    comparison.verdict = verdict(&comparison, no_more);
    Ok(comparison)
}

/// `no_more`: the trajectory's arm spent no more forward passes than the base method's, so that their ends can be compared.
fn verdict(c: &Comparison, no_more: bool) -> String {
    let n = c.seeds.len();
    let ended = match (c.final_ratio.low, c.final_ratio.high) {
        (Some(low), _) if low > 1.0 => "and ends farther from the reference than the base method",
        (_, Some(high)) if high < 1.0 => "and ends nearer to the reference than the base method",
        (Some(_), _) => "and the final distances cannot be told apart",
        _ => "(one seed: no uncertainty can be given)",
    };
    let (Some(updates), Some(forwards)) = (&c.updates, &c.forwards) else {
        let never = c.seeds.iter().filter(|s| s.forwards.is_none()).count();
        // Noise alone lets some seeds of two equal arms end above.
        let lead = match c.final_ratio.low {
            Some(low) if low <= 1.0 => "Undecided",
            _ => "The trajectory does not pay here",
        };
        return format!(
            "{lead}: in {never} of {n} seeds it never came down to the distance that the base method ends with, {ended}."
        );
    };
    // What the base method needs to come down to its own final level, in the same unit.
    let own = c.base_updates.mean;
    let percent = |i: &Interval| match (i.low, i.high) {
        (Some(low), Some(high)) => {
            format!("{:.0} % [{:.0}, {:.0}]", 100.0 * i.mean, 100.0 * low, 100.0 * high)
        }
        _ => format!("{:.0} %", 100.0 * i.mean),
    };
    let share = format!(
        "{} of the generator updates and {} of the forward passes, stage 1 counted (the base method comes down to it for \
         the first time after {:.0} %)",
        percent(updates),
        percent(forwards),
        100.0 * own
    );
    let nearer = no_more && c.final_ratio.high.is_some_and(|high| high < 1.0);
    match (forwards.low, forwards.high) {
        (_, Some(high)) if high < own || nearer && high < 1.0 => {
            format!("The trajectory pays: the base method's final distance is reached with {share}, {ended}.")
        }
        (Some(low), _) if low > own => {
            format!("The trajectory does not pay here: the base method's final distance takes {share}, {ended}.")
        }
        _ => format!("Undecided: the base method's final distance is reached with {share}, {ended}."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(seed: u64, offset: u64, distances: &[f64]) -> Curve {
        let points = distances
            .iter()
            .enumerate()
            .map(|(k, &distance)| Point {
                updates: 100 * k as u64,
                forwards: offset + 400 * k as u64,
                seconds: offset as f64 / 100.0 + 2.0 * k as f64,
                distance,
            })
            .collect();
        Curve { seed, nodes: usize::from(offset > 0), points }
    }

    #[test]
    fn shares_are_interpolated_and_count_stage_one() {
        let base = curve(0, 0, &[50.0, 20.0, 12.0, 11.0, 10.0]);
        let with = curve(0, 200, &[50.0, 12.0, 8.0, 7.0, 6.0]);
        let c = compare(&[base], &[with]).unwrap();
        let s = c.seeds[0];
        assert_eq!((s.base, s.trajectory, s.base_updates), (10.0, 6.0, 1.0));
        // Distance 10 lies half way between updates 100 and 200: 150 of 400; forwards 200 + 600 of 1600; 2 + 3 of 8 s.
        assert_eq!((s.updates, s.forwards, s.seconds), (Some(0.375), Some(0.5), Some(0.625)));
        // 20 is the base method's distance after 100 updates and 400 passes: 30/38 of that, and 200 passes more.
        let share = 30.0 / 38.0;
        assert!((s.early_updates.unwrap() - share).abs() < 1e-12);
        assert!((s.early_forwards.unwrap() - (share + 0.5)).abs() < 1e-12);
        assert!(c.verdict.contains("Undecided") && c.verdict.contains("one seed"), "{}", c.verdict);
    }

    #[test]
    fn verdicts_follow_the_interval() {
        let base: Vec<Curve> = (0..3).map(|s| curve(s, 0, &[50.0, 20.0, 12.0, 11.0, 10.0 + 0.1 * s as f64])).collect();
        let fast: Vec<Curve> = (0..3).map(|s| curve(s, 10, &[50.0, 11.0 + 0.1 * s as f64, 8.0, 8.0, 8.0])).collect();
        let c = compare(&base, &fast).unwrap();
        assert!(c.verdict.starts_with("The trajectory pays") && c.verdict.contains("nearer"), "{}", c.verdict);
        let slow: Vec<Curve> = (0..3).map(|s| curve(s, 900, &[50.0, 30.0, 20.0, 12.0, 9.9])).collect();
        assert!(compare(&base, &slow).unwrap().verdict.starts_with("The trajectory does not pay"));
        let never: Vec<Curve> = (0..3).map(|s| curve(s, 10, &[50.0, 30.0, 20.0, 12.0, 11.0])).collect();
        let c = compare(&base, &never).unwrap();
        assert!(
            c.updates.is_none() && c.verdict.contains("3 of 3 seeds") && c.verdict.contains("farther"),
            "{}",
            c.verdict
        );
        assert!(compare(&base, &[]).is_err());
    }

    /// A base method that stalls is at its own level early: at equal forward passes a nearer end decides, at more it does not.
    #[test]
    fn a_nearer_end_for_the_same_passes_pays() {
        let base: Vec<Curve> =
            (0..3).map(|s| curve(s, 0, &[50.0, 30.0, 10.0 + s as f64, 13.0, 10.0 + s as f64])).collect();
        let with: Vec<Curve> = (0..3).map(|s| curve(s, 20, &[50.0, 30.0, 12.0, 6.0, 6.0 + 0.1 * s as f64])).collect();
        let c = compare(&base, &with).unwrap();
        assert!(c.forwards.unwrap().mean > c.base_updates.mean && c.final_ratio.high.unwrap() < 1.0);
        assert!(c.verdict.starts_with("Undecided"), "{}", c.verdict);
        let same: Vec<Curve> = with
            .into_iter()
            .map(|mut t| {
                t.points.pop();
                t
            })
            .collect();
        let c = compare(&base, &same).unwrap();
        assert!(c.verdict.starts_with("The trajectory pays") && c.verdict.contains("nearer"), "{}", c.verdict);
    }

    #[test]
    fn intervals_are_students() {
        // scipy.stats.t.interval(0.95, 2, 2, sem([1, 2, 3])) = (-0.4841, 4.4841)
        let i = Interval::of(&[1.0, 2.0, 3.0]);
        assert!((i.low.unwrap() + 0.4841).abs() < 1e-3 && (i.high.unwrap() - 4.4841).abs() < 1e-3, "{i}");
        // scipy.stats.t.ppf(0.975, 20) = 2.08596
        assert!((t95(20) - 2.08596).abs() < 1e-3);
    }
}
