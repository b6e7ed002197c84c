//! Where the time of a step goes, through `profile.cpp`.

use std::ffi::{CStr, c_char, c_void};
use std::marker::PhantomData;
use std::time::Duration;

unsafe extern "C" {
    fn disback_free(p: *mut c_void);
    fn disback_time_operators() -> u64;
    fn disback_operator_times(handle: u64, inside: *mut i64) -> *mut c_char;
}

/// One operator of libtorch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    /// libtorch's name of the operator, such as `aten::addmm`.
    pub name: String,
    /// How often it was called.
    pub calls: u64,
    /// Time inside it, without the operators that it called.
    pub own: Duration,
}

/// What [`OperatorTimes::finish`] found.
#[derive(Debug, Clone)]
pub struct Times {
    /// Time inside operators, all of them together.
    pub inside: Duration,
    /// Every operator that was called; the longest `own` comes first.
    pub operators: Vec<Operator>,
}

/// Times the operators that this thread calls, those of backward passes on the CPU too. On CUDA it is the time to launch
/// them.
#[derive(Debug)]
pub struct OperatorTimes {
    handle: u64,
    finished: bool,
    /// Bound to its thread.
    _thread: PhantomData<*const ()>,
}

impl OperatorTimes {
    /// Starts timing, with all times at zero. One at a time on each thread: they share the counters.
    pub fn start() -> Self {
        // SAFETY: adds a callback of this thread.
        Self { handle: unsafe { disback_time_operators() }, finished: false, _thread: PhantomData }
    }

    /// Stops timing and returns the times since [`OperatorTimes::start`].
    pub fn finish(mut self) -> Times {
        self.end()
    }

    fn end(&mut self) -> Times {
        self.finished = true;
        let mut inside = 0;
        // SAFETY: removes the callback that `start` added; a NUL-terminated string from malloc, ours to free.
        let text = unsafe {
            let text = disback_operator_times(self.handle, &mut inside);
            let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
            disback_free(text.cast());
            owned
        };
        let operator = |line: &str| {
            let mut words = line.rsplitn(3, ' ');
            let own = Duration::from_nanos(words.next()?.parse().ok()?);
            let calls = words.next()?.parse().ok()?;
            Some(Operator { name: words.next()?.to_owned(), calls, own })
        };
        Times {
            inside: Duration::from_nanos(inside.max(0) as u64),
            operators: text.lines().filter_map(operator).collect(),
        }
    }
}

impl Drop for OperatorTimes {
    fn drop(&mut self) {
        if !self.finished {
            self.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind, Tensor};

    #[test]
    fn operators_are_counted_with_their_own_time() {
        let x = Tensor::ones([64, 64], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let times = OperatorTimes::start();
        for _ in 0..3 {
            x.matmul(&x).sum(Kind::Float).backward();
        }
        let times = times.finish();
        let of = |name: &str| times.operators.iter().find(|o| o.name == name).map_or(0, |o| o.calls);
        // matmul calls mm; the backward pass takes two more.
        assert_eq!((of("aten::matmul"), of("aten::mm")), (3, 9), "{times:?}");
        let sum: Duration = times.operators.iter().map(|o| o.own).sum();
        assert_eq!(sum, times.inside);
        let again = OperatorTimes::start().finish();
        assert!(again.operators.is_empty() && again.inside.is_zero());
    }
}
