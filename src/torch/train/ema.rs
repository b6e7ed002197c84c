//! Exponential moving average of the generator's weights.

use tch::Tensor;

use crate::error::Result;
use crate::torch::dist::Owners;
use crate::torch::params::ParamSet;
use crate::torch::shim;

/// Decay of one update in which `batch` images were seen, after `seen` images in all (this batch included): after
/// `half_life` images an old weight counts half. `ramp` > 0 shortens the half-life to `ramp * seen` at the start, so that
/// the initial weights do not linger; EDM uses 0.05.
pub fn decay(batch: u64, seen: u64, half_life: f64, ramp: f64) -> f64 {
    let half_life = if ramp > 0.0 { half_life.min(ramp * seen as f64) } else { half_life };
    if half_life <= 0.0 { 0.0 } else { 0.5f64.powf(batch as f64 / half_life) }
}

/// Moves the average (f32) towards `live`: `ema = decay * ema + (1 - decay) * live`. `owners`: where each process keeps a share of the
/// average, it moves that.
pub fn update(ema: &ParamSet, live: &ParamSet, decay: f64, owners: Option<&Owners>) -> Result<()> {
    let mine = |list: &[Tensor]| -> Vec<Tensor> {
        let kept = list.iter().enumerate().filter(|(i, _)| owners.is_none_or(|o| o.is_mine(*i)));
        kept.map(|(_, t)| t.shallow_clone()).collect()
    };
    let (ema, live) = (mine(ema.tensors()), mine(live.tensors()));
    if ema.is_empty() { Ok(()) } else { shim::foreach_lerp(&ema, &live, 1.0 - decay) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_life_is_counted_in_images() {
        // 40 updates of 25 images with a half-life of 500: two half-lives.
        let product: f64 = (0..40).map(|_| decay(25, 1_000_000, 500.0, 0.0)).product();
        assert!((product - 0.25).abs() < 1e-12);
        assert_eq!(decay(128, 128, 0.0, 0.05), 0.0, "no half-life: the average is the live weight");
        // Ramp: the first batch has a half-life of 5 % of itself.
        assert!((decay(100, 100, 1e6, 0.05) - 0.5f64.powf(20.0)).abs() < 1e-15);
        assert_eq!(decay(100, 100_000_000, 1e6, 0.05), 0.5f64.powf(100.0 / 1e6));
    }

    #[test]
    fn moves_in_place() {
        let set = |v: f32| ParamSet::new(vec!["w".into()], vec![Tensor::from_slice(&[v, 2.0 * v])]).unwrap();
        let (ema, live) = (set(1.0), set(3.0));
        live.set_requires_grad(true).unwrap();
        update(&ema, &live, 0.75, None).unwrap();
        assert_eq!(Vec::<f32>::try_from(&ema.tensors()[0]).unwrap(), [1.5, 3.0]);
        update(&ema, &live, 0.0, None).unwrap();
        assert!(ema.tensors()[0].equal(&live.tensors()[0].detach()));
    }
}
