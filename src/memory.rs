//! Memory that is free for this process.

use std::path::Path;

/// Bytes that are free where a run computes, and what bounds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Free {
    /// Bytes that a process may still take.
    pub bytes: u64,
    /// For people: `on this machine`, `in this control group`, `on cuda:0`.
    pub place: String,
}

/// What the machine, the process's control groups (v1 and v2) and `ulimit -v` leave. `None`: nothing says.
pub fn free() -> Option<Free> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let bounds = [
        (available(&read("/proc/meminfo")), "on this machine"),
        (
            of_groups(Path::new("/sys/fs/cgroup"), &read("/proc/self/cgroup")),
            "in this process's control group (its memory limit)",
        ),
        (of_process(&read("/proc/self/limits"), &read("/proc/self/status")), "within this process's limit (ulimit -v)"),
    ];
    let least = bounds.into_iter().filter_map(|(bytes, place)| Some((bytes?, place))).min_by_key(|(bytes, _)| *bytes);
    least.map(|(bytes, place)| Free { bytes, place: place.into() })
}

/// `MemAvailable` of /proc/meminfo.
fn available(meminfo: &str) -> Option<u64> {
    field(meminfo, "MemAvailable:")
}

/// A field of /proc's tables, in bytes.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// What the control groups of a process leave, from the text of /proc/self/cgroup. `root`: where they are mounted.
fn of_groups(root: &Path, groups: &str) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let (base, limit, usage, file_cache) = match controllers {
            "" => (root.to_owned(), "memory.max", "memory.current", "inactive_file "),
            c if c.split(',').any(|c| c == "memory") => {
                (root.join("memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            }
            _ => continue,
        };
        // A container sees its own group as the root of the mount; every group above bounds those below it.
        let inside = base.join(path.trim_start_matches('/'));
        let mut folder: Option<&Path> = Some(&inside);
        while let Some(at) = folder.filter(|f| f.starts_with(&base)) {
            let number = |name: &str| std::fs::read_to_string(at.join(name)).ok()?.trim().parse::<u64>().ok();
            // (`max`, or nearly 2^63, is no limit.)
            if let (Some(limit), Some(usage)) = (number(limit).filter(|l| *l < 1 << 60), number(usage)) {
                let stat = std::fs::read_to_string(at.join("memory.stat")).unwrap_or_default();
                let cache = stat.lines().find_map(|l| l.strip_prefix(file_cache)?.trim().parse::<u64>().ok());
                let free = limit.saturating_sub(usage.saturating_sub(cache.unwrap_or(0)));
                least = Some(least.map_or(free, |l| l.min(free)));
            }
            folder = at.parent();
        }
    }
    least
}

/// What `ulimit -v` leaves, from /proc/self/limits and /proc/self/status.
fn of_process(limits: &str, status: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max address space"))?;
    let limit = line.split_whitespace().next()?.parse::<u64>().ok()?;
    Some(limit.saturating_sub(field(status, "VmSize:")?))
}

/// Runs this and gives the bytes that the process held more at its peak meanwhile than when it began. `None`: the system does not
/// count them (Linux does).
pub fn peak_of<T>(run: impl FnOnce() -> T) -> (T, Option<u64>) {
    let status = || std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let before = reset_peak().then(|| field(&status(), "VmRSS:")).flatten();
    let made = run();
    (made, before.and_then(|before| Some(peak()?.saturating_sub(before))))
}

/// Most bytes that the process has held in memory since it began, or since [`reset_peak`].
pub fn peak() -> Option<u64> {
    field(&std::fs::read_to_string("/proc/self/status").unwrap_or_default(), "VmHWM:")
}

/// Begins [`peak`] anew; whether the system could.
pub fn reset_peak() -> bool {
    std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

/// `1.5 GiB`.
pub fn shown(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, "B");
    for next in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, next);
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn control_groups_of_both_versions_bound_what_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path: PathBuf = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let of = |groups: &str| of_groups(dir.path(), groups);
        assert_eq!(of("0::/user/job\n"), None);
        write("user/job/memory.max", "max\n");
        write("user/job/memory.current", "700\n");
        assert_eq!(of("0::/user/job\n"), None);
        // A limit further up holds for all below it, and cached files do not count.
        write("user/memory.max", "1000\n");
        write("user/memory.current", "900\n");
        write("user/memory.stat", "anon 600\ninactive_file 250\n");
        assert_eq!(of("0::/user/job\n"), Some(350));
        write("user/job/memory.max", "800\n");
        assert_eq!(of("0::/user/job\n"), Some(100));
        write("memory/slurm/memory.limit_in_bytes", "5000\n");
        write("memory/slurm/memory.usage_in_bytes", "4000\n");
        write("memory/slurm/memory.stat", "inactive_file 1\ntotal_inactive_file 90\n");
        assert_eq!(of("4:memory:/slurm\n1:cpu:/\n"), Some(1090));
        write("memory/slurm/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(of("4:memory:/slurm\n1:cpu:/\n"), None);
        // In a container the path is that of the host, and the mount's root is the group.
        write("memory/memory.limit_in_bytes", "300\n");
        write("memory/memory.usage_in_bytes", "100\n");
        assert_eq!(of("4:cpuset,memory:/docker/abc\n"), Some(200));
        assert_eq!(available("MemTotal: 9 kB\nMemAvailable:   3 kB\n"), Some(3072));
        assert!(free().is_none_or(|f| f.bytes > 0));
    }

    #[test]
    fn the_limit_of_the_process_counts_what_it_has_taken() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax address space         10240                unlimited            bytes\n";
        assert_eq!(of_process(limits, "VmPeak: 9 kB\nVmSize:\t       4 kB\n"), Some(6144));
        assert_eq!(of_process(&limits.replace("10240", "unlimited"), "VmSize: 4 kB\n"), None);
    }
}
