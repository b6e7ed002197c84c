//! Whether a call with so many rows will fit into memory, found with a few rows before it is made.

use super::{Dim, Engine};
use crate::error::{Error, Result};
use crate::memory::{self, Free, shown};
use crate::tensor::HostTensor;

/// Rows of a call that is never looked at.
const FEW: usize = 8;
/// Rows of the call that is measured.
const MEASURED: usize = 4;
/// A network keeps less than this many times a row's own bytes: attention over a latent of 64 x 64 x 4 keeps 8,000 times.
const UNLIKELY: u64 = 1 << 15;

/// Compares what a call takes on the CPU with what is free, once for each larger number of rows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Foresight {
    fits: usize,
}

impl Foresight {
    /// Refuses a call of `engine` with `rows` rows that will not fit. `inputs(n)` makes inputs of `n` rows.
    ///
    /// Errors: as of [`Foresight::check_calls`]; inputs that cannot be made.
    pub fn check(
        &mut self,
        engine: &mut dyn Engine,
        rows: usize,
        inputs: impl Fn(usize) -> Result<Vec<(String, HostTensor)>>,
    ) -> Result<()> {
        // A file that fixes its batch is called with that, whatever is asked for.
        let fixed = |d: Option<&Dim>| matches!(d, Some(Dim::Fixed(_)));
        if self.is_known(rows) || engine.inputs().iter().all(|i| fixed(i.shape.first())) {
            return Ok(());
        }
        let own = inputs(1)?.iter().map(|(_, t)| t.bytes().len() as u64).sum();
        self.check_calls(rows, own, |n| {
            let inputs = inputs(n)?;
            let named: Vec<(&str, &HostTensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t)).collect();
            engine.run(&named).map(drop)
        })
    }

    /// Refuses a call with `rows` rows of `own` bytes each that will not fit. Where a fit is not plain, `call(n)` is made with one row
    /// and with four, and the growth of the process's memory is taken as that of every row. (What a device holds is not seen.)
    ///
    /// Errors: it does not fit, with the rows that would; a call that fails.
    pub fn check_calls(&mut self, rows: usize, own: u64, call: impl FnMut(usize) -> Result<()>) -> Result<()> {
        match memory::free() {
            Some(free) if !self.is_known(rows) => self.check_in(&free, rows, own, call),
            _ => Ok(()),
        }
    }

    fn is_known(&self, rows: usize) -> bool {
        rows <= self.fits.max(FEW)
    }

    fn check_in(
        &mut self,
        free: &Free,
        rows: usize,
        own: u64,
        mut call: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        if (rows as u64).saturating_mul(own.saturating_mul(UNLIKELY)) > free.bytes {
            // The first call makes what is made once.
            call(1)?;
            let (called, grown) = memory::peak_of(|| call(MEASURED));
            called?;
            // The one row's memory is used again. Inputs and outputs are copied on their way.
            let row = (grown.unwrap_or(0) / (MEASURED as u64 - 1)).max(2 * own);
            let takes = (rows as u64).saturating_mul(row);
            if takes > free.bytes {
                let fit = (free.bytes / row.max(1)).max(1);
                return Err(Error::usage(format!(
                    "a call with {rows} rows takes about {}, but {} are free {}",
                    shown(takes),
                    shown(free.bytes),
                    free.place
                ))
                .hint(format!("give fewer at a time (--batch; --images of verify), at most about {fit}")));
            }
        }
        self.fits = rows;
        Ok(())
    }
}

#[cfg(all(test, feature = "tract"))]
mod tests {
    use super::*;
    use crate::runtime::student::{SampleRequest, Student};
    use crate::runtime::{EngineKind, EngineOptions};

    #[test]
    fn a_call_that_does_not_fit_is_refused_before_it_is_made() {
        let file = crate::runtime::testing::halved(&[1 << 18], &[]);
        let options = EngineOptions { engine: EngineKind::Tract, ..EngineOptions::default() };
        let mut student = Student::from_bytes(&file, &options).unwrap();
        let mut check = |rows: usize, bytes: u64| {
            let free = Free { bytes, place: "on this machine".into() };
            let (mut foresight, mut most) = (Foresight::default(), 0);
            let checked = foresight.check_in(&free, rows, 1 << 20, |n| {
                most = most.max(n);
                student.sample(&SampleRequest { batch: n, ..SampleRequest::default() }, 0, n).map(drop)
            });
            checked.map(|()| most).map_err(|e| (e, most))
        };
        // A MiB goes in, one comes out: 2 MiB a row at least, less than 20.
        let (e, most) = check(1_000_000, 20 << 30).unwrap_err();
        assert_eq!((e.exit_code(), most), (2, MEASURED));
        let hint = e.hint_text().unwrap().rsplit(' ').next().unwrap().parse::<u64>().unwrap();
        assert!((1 << 10..=10 << 10).contains(&hint), "{e}");
        assert_eq!(check(100, 20 << 30).unwrap(), MEASURED);
        assert!(check(100, 100 << 20).is_err());
        // What fits in any case is not tried.
        assert_eq!(check(100, u64::MAX).unwrap(), 0);
        let refused =
            student.sample(&SampleRequest { batch: 1 << 40, ..SampleRequest::default() }, 0, 1 << 40).unwrap_err();
        assert!(refused.to_string().contains("a call with 1099511627776 rows takes about"), "{refused}");
    }
}
