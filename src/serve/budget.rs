//! Memory of requests in flight: bodies, arrays, samples and answers together stay below a number of bytes.

use std::sync::Arc;

use axum::body::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Permits are of so many bytes.
const UNIT: u64 = 1024;

/// Bytes that requests may hold together.
#[derive(Debug, Clone)]
pub struct Budget {
    permits: Arc<Semaphore>,
}

/// Bytes that one request holds; given back when it is dropped.
#[derive(Debug)]
pub struct Held {
    permit: OwnedSemaphorePermit,
}

impl Budget {
    /// A budget of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let units = usize::try_from(bytes / UNIT).unwrap_or(usize::MAX).clamp(1, Semaphore::MAX_PERMITS);
        Self { permits: Arc::new(Semaphore::new(units)) }
    }

    /// Takes so many bytes, where they are free.
    pub fn take(&self, bytes: u64) -> Option<Held> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).ok()?;
        let permit = self.permits.clone().try_acquire_many_owned(units).ok()?;
        Some(Held { permit })
    }
}

impl Held {
    /// Holds so many bytes from now on: gives back what is more, takes what is less. `None` where the budget has not got them.
    pub fn resize(mut self, budget: &Budget, bytes: u64) -> Option<Self> {
        let (now, wanted) = (self.permit.num_permits() as u64, bytes.div_ceil(UNIT));
        if wanted <= now {
            drop(self.permit.split((now - wanted) as usize));
        } else {
            self.permit.merge(budget.take((wanted - now) * UNIT)?.permit);
        }
        Some(self)
    }

    /// The bytes of an answer, which hold their share of the budget until they are sent.
    pub fn keep(self, bytes: Vec<u8>) -> Bytes {
        struct Owner(Vec<u8>, #[allow(dead_code, reason = "held until the answer is sent")] Held);
        impl AsRef<[u8]> for Owner {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }
        Bytes::from_owner(Owner(bytes, self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_taken_grown_and_given_back() {
        let budget = Budget::new(10 * 1024);
        let first = budget.take(6 * 1024).unwrap();
        assert!(budget.take(5 * 1024).is_none());
        let first = first.resize(&budget, 1500).unwrap();
        let second = budget.take(8 * 1024).unwrap();
        assert!(first.resize(&budget, 3 * 1024).is_none(), "the 2 KiB of the first are given back, not 3 taken");
        let answer = second.keep(vec![1, 2, 3]);
        let copy = answer.clone();
        drop(answer);
        assert!(budget.take(3 * 1024).is_none() && copy[..] == [1, 2, 3]);
        drop(copy);
        assert!(budget.take(10 * 1024).is_some());
    }
}
