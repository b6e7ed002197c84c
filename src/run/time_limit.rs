//! The end of the time that a run has: it stops with a checkpoint before it.

use std::time::{Duration, Instant, SystemTime};

use crate::error::{Error, Result};

/// When a run must be over.
#[derive(Debug, Clone, Copy)]
pub struct TimeLimit {
    end: Instant,
    /// Time at the end that is left alone.
    reserve: Duration,
}

/// Left alone before the end of a Slurm job, which then is killed without mercy: the summary and the way out take time too.
const SLURM_RESERVE: Duration = Duration::from_secs(60);

/// Share of the longest step so far, with its checkpoint, that the next one may take.
const LONGER: f64 = 1.5;

impl TimeLimit {
    /// So long from now.
    pub fn after(time: Duration) -> Self {
        // (A time beyond what the clock can say is no limit that anybody meets.)
        let end = Instant::now().checked_add(time).unwrap_or_else(|| Instant::now() + Duration::from_secs(1 << 32));
        Self { end, reserve: Duration::ZERO }
    }

    /// Reads `23h45m`, `90m`, `1d12h`, `45s` or a number of minutes, as Slurm's `--time` has them.
    pub fn parse(text: &str) -> Result<Duration> {
        let refused = || {
            Error::usage(format!("time limit `{text}`: expected a time as in 23h45m, 90m, 1d12h or 45s, or minutes"))
        };
        let mut seconds = 0u64;
        let mut rest = text.trim();
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let number: u64 = rest[..digits].parse().map_err(|_| refused())?;
            let unit = rest[digits..].chars().next();
            let each = match unit {
                Some('d') => 86_400,
                Some('h') => 3600,
                Some('m') => 60,
                Some('s') => 1,
                None if digits == text.trim().len() => 60,
                _ => return Err(refused()),
            };
            seconds = number.checked_mul(each).and_then(|s| seconds.checked_add(s)).ok_or_else(refused)?;
            rest = &rest[digits + unit.map_or(0, char::len_utf8)..];
        }
        if seconds == 0 { Err(refused()) } else { Ok(Duration::from_secs(seconds)) }
    }

    /// The end of a Slurm job, from the value of `SLURM_JOB_END_TIME` (seconds since 1970); `None`: it says nothing.
    pub fn of_slurm(value: &str) -> Option<Self> {
        let end = Duration::from_secs(value.trim().parse().ok().filter(|s| *s > 0)?);
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
        Some(Self { reserve: SLURM_RESERVE, ..Self::after(end.saturating_sub(now)) })
    }

    /// The one that comes first.
    #[must_use]
    pub fn sooner(self, other: Option<Self>) -> Self {
        let ends = |limit: &Self| limit.end.checked_sub(limit.reserve).unwrap_or(limit.end);
        other.filter(|o| ends(o) < ends(&self)).unwrap_or(self)
    }

    /// Whether a further step would come too late. `longest`: that of a step so far, checkpoint included.
    pub fn is_reached(&self, longest: Duration) -> bool {
        self.end.saturating_duration_since(Instant::now()) <= self.reserve + longest.mul_f64(LONGER)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_people_write_them() {
        for (text, seconds) in
            [("23h45m", 85_500), ("90m", 5400), ("1d12h", 129_600), ("45s", 45), ("30", 1800), (" 1h2m3s ", 3723)]
        {
            assert_eq!(TimeLimit::parse(text).unwrap().as_secs(), seconds, "{text}");
        }
        for text in ["", "h", "5x", "1h30", "-5m", "1.5h", "0", "99999999999999999999h", "1:30:00"] {
            let e = TimeLimit::parse(text).unwrap_err();
            assert!(e.exit_code() == 2 && e.to_string().contains("23h45m"), "{text}: {e}");
        }
    }

    #[test]
    fn a_step_that_would_come_too_late_is_not_begun() {
        let second = Duration::from_secs(1);
        let limit = TimeLimit::after(10 * second);
        assert!(!limit.is_reached(6 * second) && limit.is_reached(7 * second));
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let slurm = TimeLimit::of_slurm(&(now + 100).to_string()).unwrap();
        assert!(!slurm.is_reached(20 * second) && slurm.is_reached(30 * second));
        assert!(TimeLimit::of_slurm(&(now + 50).to_string()).unwrap().is_reached(Duration::ZERO));
        assert!(TimeLimit::of_slurm("1").unwrap().is_reached(Duration::ZERO));
        assert!(TimeLimit::of_slurm("").is_none() && TimeLimit::of_slurm("0").is_none());
        assert!(!slurm.sooner(Some(TimeLimit::after(1000 * second))).is_reached(second));
        assert!(slurm.sooner(Some(limit)).is_reached(7 * second));
    }
}
