//! What a set of samples takes in memory, said and checked before it is gathered.

use super::Source;
use crate::axes::written;
use crate::error::{Error, Result};
use crate::memory;

/// Below this much nobody is asked.
const LARGE: u64 = 256 << 20;

/// What `count` samples of a source take: all of them as f32 where they are measured by their values, else `batch` at a time as 8
/// bits. Bytes, and a sentence for people; `None` for statistics, which hold no samples.
///
/// Errors, of kind [`crate::Kind::Usage`]: more is held at once than there is memory for.
pub fn foresee(source: &Source, count: usize, by_values: bool, batch: usize) -> Result<Option<(u64, String)>> {
    let Some(row) = source.sample_shape() else { return Ok(None) };
    let each = row.iter().fold(1u64, |n, d| n.saturating_mul(*d as u64));
    let what = format!("{count} samples of {}", written(&row));
    if !by_values {
        let of = |n: usize| memory::shown(each.saturating_mul(n as u64));
        let at_once = batch.clamp(1, count.max(1));
        let text = format!("{what}: {} as 8 bits, of which {} are in memory at a time", of(count), of(at_once));
        return Ok(Some((each.saturating_mul(count as u64), text)));
    }
    let bytes = each.saturating_mul(4).saturating_mul(count as u64);
    let taken = memory::shown(bytes);
    match memory::free().filter(|free| bytes > LARGE && bytes > free.bytes) {
        None => Ok(Some((bytes, format!("{what}: {taken} as f32, all of them in memory")))),
        Some(free) => Err(Error::usage(format!(
            "{what} take {taken} in memory, {} are free {}",
            memory::shown(free.bytes),
            free.place
        ))
        .hint("-n takes fewer of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::HostTensor;

    #[test]
    fn sizes_are_said_and_what_has_no_room_is_refused() {
        let source = || Source::Values(HostTensor::new(&[2, 16, 8], &[0f32; 256]).unwrap());
        let say = |count, by_values| foresee(&source(), count, by_values, 64).unwrap().unwrap().1;
        assert_eq!(say(2048, true), "2048 samples of [B, 16, 8]: 1.0 MiB as f32, all of them in memory");
        assert_eq!(
            say(2048, false),
            "2048 samples of [B, 16, 8]: 256.0 KiB as 8 bits, of which 8.0 KiB are in memory at a time"
        );
        if memory::free().is_some() {
            let e = foresee(&source(), 1 << 50, true, 64).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains("-n takes fewer"), "{e}");
        }
    }
}
