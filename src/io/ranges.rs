//! Whether floats look like values of the range that they are read in.

/// Rows that are looked at.
const LOOKED_AT: usize = 256;
/// Share of values that may lie far outside.
const OUTSIDE: f64 = 0.05;

/// Some of `len` rows, from the first to the last.
pub fn some_of(len: usize) -> Vec<usize> {
    let count = len.min(LOOKED_AT);
    (0..count).map(|k| if count > 1 { k * (len - 1) / (count - 1) } else { 0 }).collect()
}

/// What speaks against `values` of images being ones in the range: as a sentence. Values of `[0, 1]` and `0..255` read in
/// `[-1, 1]` are told, and the other way round.
pub fn doubt(values: &[f64], [low, high]: [f64; 2]) -> Option<String> {
    let (least, most) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| (a.min(*v), b.max(*v)));
    if values.is_empty() || !(least.is_finite() && most.is_finite()) {
        return None;
    }
    let width = high - low;
    let far = |v: &&f64| **v < low - 0.5 * width || **v > high + 0.5 * width;
    let outside = values.iter().filter(far).count() as f64 / values.len() as f64;
    let found = format!("the values go from {} to {}", shown(least), shown(most));
    if outside > OUTSIDE {
        return Some(format!("{found}, {:.0} % of them far outside of {low} to {high}", 100.0 * outside));
    }
    // (A blank set lies anywhere.)
    let blank = most - least < 1e-6 * width;
    let middle = low + 0.5 * width;
    if !blank && low < 0.0 && least >= middle && most <= high {
        return Some(format!("{found}, none in the lower half of {low} to {high}"));
    }
    (!blank && most - least < width / 64.0).then(|| format!("{found}, less than 1/64 of {low} to {high}"))
}

/// A number for people.
fn shown(v: f64) -> String {
    let text = format!("{v:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_confusions_are_told() {
        // Dark images with some light, as digits are.
        let unit: Vec<f64> = (0..1000).map(|k| if k % 5 == 0 { f64::from(k) / 1000.0 } else { 0.0 }).collect();
        let to = |low: f64, high: f64| -> Vec<f64> { unit.iter().map(|v| low + (high - low) * v).collect() };
        let ranges = [[-1.0, 1.0], [0.0, 1.0], [0.0, 255.0]];
        for held in ranges {
            for read in ranges {
                let told = doubt(&to(held[0], held[1]), read);
                assert_eq!(told.is_some(), held != read, "{held:?} read as {read:?}: {told:?}");
            }
        }
        // A sampler overshoots a little, and a table has tails.
        let wide: Vec<f64> = (0..1000).map(|k| f64::from(k % 200) / 80.0 - 1.25).collect();
        assert_eq!(doubt(&wide, [-1.0, 1.0]), None);
        assert_eq!(doubt(&[0.5; 40], [-1.0, 1.0]), None);
        assert_eq!((some_of(3), some_of(1), some_of(1000).len()), (vec![0, 1, 2], vec![0], 256));
    }
}
