//! When stage 2 goes on to the next target.

use tch::Tensor;

use crate::distill::checkpoint::State;
use crate::distill::config::Switch;
use crate::distill::job::Job;
use crate::distill::trajectory::target_by_count;
use crate::error::Result;

/// Relative fall of the mismatch below which it counts as not falling.
const FALL: f32 = 0.02;

/// The next target, where it is time to switch before generator update `update`. `every`: the updates of each target, by count.
pub(super) fn next_target(
    job: &Job,
    state: &mut State,
    update: u64,
    (last, every): (usize, u64),
    mismatch_sum: &mut Tensor,
) -> Result<Option<usize>> {
    let settings = &job.config.backtrack;
    if !state.iteration.is_multiple_of(settings.ratio) {
        return Ok(None);
    }
    match settings.switch {
        Switch::Count => {
            let target = target_by_count(update, every, last);
            Ok((target != state.target).then_some(target))
        }
        Switch::Mismatch => {
            let spent = update.saturating_sub(state.target_since);
            if state.target == 0 || spent == 0 || !spent.is_multiple_of(settings.switch_every) {
                return Ok(None);
            }
            let mismatch = (mismatch_sum.f_double_value(&[])? / settings.switch_every as f64) as f32;
            // (Not in place: the loop may hold on to the sum of before.)
            *mismatch_sum = mismatch_sum.f_zeros_like()?;
            if !plateaued(state, mismatch, settings.switch_patience) && spent < settings.switch_max {
                return Ok(None);
            }
            (state.best_mismatch, state.stale) = (None, 0);
            Ok(Some(state.target - 1))
        }
    }
}

/// Whether the mismatch has stopped falling: `patience` looks without a new low. None left at all counts as a look
/// without one.
fn plateaued(state: &mut State, mismatch: f32, patience: u64) -> bool {
    if state.best_mismatch.is_none_or(|best| mismatch < best - FALL * best.abs()) {
        state.best_mismatch = Some(mismatch);
        state.stale = u64::from(mismatch <= 0.0);
    } else {
        state.stale += 1;
    }
    state.stale >= patience
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::distill::checkpoint::StageKind;

    #[test]
    fn the_mismatch_plateaus_after_patience_looks_without_a_fall() {
        let mut state = State::new(StageKind::Backtrack, "");
        let looks = [5.0, 3.0, 2.99, 3.1, 2.0, 1.99, 2.2, 1.97];
        let found: Vec<bool> = looks.iter().map(|&m| plateaued(&mut state, m, 3)).collect();
        assert_eq!(found, [false, false, false, false, false, false, false, true]);
        // Nothing left to teach.
        let mut state = State::new(StageKind::Backtrack, "");
        assert!(plateaued(&mut state, -0.1, 1));
        // NaN is no new low.
        let mut state = State { best_mismatch: Some(1.0), ..State::new(StageKind::Backtrack, "") };
        assert!(plateaued(&mut state, f32::NAN, 1));
    }
}
