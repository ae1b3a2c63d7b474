//! What the system says about memory: control groups of both versions, pressure stall information, `MemAvailable`. Linux has these as
//! small files, any of which may be absent; elsewhere all are.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version 1 has no word for "no limit" but a number of pages that nobody has.
const NO_LIMIT_BYTES: u64 = 1 << 62;

/// What the system says about memory at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Reading {
    /// Bytes that this process can still take before something else must give way: the least of `MemAvailable` and, for its control
    /// group and each above it, the limit less what is in use. File cache does not count as in use: it is the first to go.
    pub available_bytes: Option<u64>,
    /// Bytes that there are in all: the least of the machine's memory and those limits.
    pub limit_bytes: Option<u64>,
    /// The time in which some thread of the control group (or, where it does not tell, of the machine) waited for memory, since it
    /// exists.
    pub stalled: Option<Duration>,
}

/// The files that tell about memory, found once.
#[derive(Debug, Clone)]
pub struct Sensors {
    meminfo: PathBuf,
    pressure: PathBuf,
    /// The control group of this process and those above it.
    groups: Vec<Group>,
}

#[derive(Debug, Clone)]
struct Group {
    dir: PathBuf,
    files: &'static GroupFiles,
}

/// The names that one version of control groups has.
#[derive(Debug)]
struct GroupFiles {
    /// Files with a limit; in bytes, or a word for none.
    limits: &'static [&'static str],
    usage: &'static str,
    /// Lines of `memory.stat` with file cache, of the group and those below it.
    caches: &'static [&'static str],
}

static VERSION_1: GroupFiles = GroupFiles {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    caches: &["total_inactive_file", "total_active_file"],
};
// Above `memory.high` the system slows a group down; above `memory.max` it kills.
static VERSION_2: GroupFiles = GroupFiles {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    caches: &["inactive_file", "active_file"],
};

impl Sensors {
    /// Those of this process.
    pub fn detect() -> Self {
        Self::below(Path::new("/"))
    }

    /// Those of a system whose files lie below `root`.
    fn below(root: &Path) -> Self {
        let proc = root.join("proc");
        let read = |name| fs::read_to_string(proc.join(name)).unwrap_or_default();
        let groups = groups(root, &read("self/cgroup"), &read("self/mountinfo"));
        let own = groups.iter().map(|group| group.dir.join("memory.pressure")).find(|path| path.exists());
        Self { meminfo: proc.join("meminfo"), pressure: own.unwrap_or_else(|| proc.join("pressure/memory")), groups }
    }

    /// What they say now.
    pub fn read(&self) -> Reading {
        let meminfo = fs::read_to_string(&self.meminfo).unwrap_or_default();
        let kib = |name| field(&meminfo, name).and_then(|kib| kib.checked_mul(1024));
        let mut reading = Reading {
            available_bytes: kib("MemAvailable:"),
            limit_bytes: kib("MemTotal:"),
            stalled: fs::read_to_string(&self.pressure).ok().and_then(|text| stalled(&text)),
        };
        for group in &self.groups {
            if let Some((limit, available)) = group.read() {
                let least = |a: Option<u64>, b: u64| Some(a.map_or(b, |a| a.min(b)));
                reading.limit_bytes = least(reading.limit_bytes, limit);
                reading.available_bytes = least(reading.available_bytes, available);
            }
        }
        reading
    }
}

impl Group {
    /// Its limit, and what is left below it; `None` without a limit.
    fn read(&self) -> Option<(u64, u64)> {
        let number = |name: &&str| fs::read_to_string(self.dir.join(name)).ok()?.trim().parse::<u64>().ok();
        let limit = self.files.limits.iter().filter_map(number).min().filter(|&limit| limit < NO_LIMIT_BYTES)?;
        let usage = number(&self.files.usage)?;
        let stat = fs::read_to_string(self.dir.join("memory.stat")).unwrap_or_default();
        let cache = self.files.caches.iter().filter_map(|name| field(&stat, name)).fold(0u64, u64::saturating_add);
        Some((limit, limit.saturating_sub(usage.saturating_sub(cache))))
    }
}

/// The control groups of a process that `/proc/self/cgroup` and `/proc/self/mountinfo` tell of, each below the next.
fn groups(root: &Path, cgroup: &str, mountinfo: &str) -> Vec<Group> {
    // The memory controller is in one hierarchy only; in a mixed system the other one has no limits, and does no harm.
    let mut groups = Vec::new();
    for line in cgroup.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let files = match controllers {
            "" => &VERSION_2,
            _ if controllers.split(',').any(|c| c == "memory") => &VERSION_1,
            _ => continue,
        };
        let Some((mount_root, mount_point)) = mountinfo.lines().find_map(|line| mount(line, files)) else { continue };
        // In a container the mount may show only part of the hierarchy, with the path still that of the whole.
        let below = path.strip_prefix(mount_root.trim_end_matches('/')).unwrap_or(path).trim_matches('/');
        let top = root.join(mount_point.trim_start_matches('/'));
        let mut dir = top.join(below);
        // A path that leads outside of what is mounted here says nothing of this place; its top may.
        if below.split('/').any(|part| part == "..") || !dir.is_dir() {
            dir.clone_from(&top);
        }
        loop {
            groups.push(Group { dir: dir.clone(), files });
            if dir == top || !dir.pop() {
                break;
            }
        }
    }
    groups
}

/// Root and mount point of a line of mountinfo, if it mounts the hierarchy with these files.
fn mount<'a>(line: &'a str, files: &GroupFiles) -> Option<(&'a str, &'a str)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let mut after = after.split(' ');
    let (root, point, kind, options) = (before.next()?, before.next()?, after.next()?, after.nth(1)?);
    let wanted = match kind {
        "cgroup2" => std::ptr::eq(files, &VERSION_2),
        "cgroup" => std::ptr::eq(files, &VERSION_1) && options.split(',').any(|option| option == "memory"),
        _ => false,
    };
    wanted.then_some((root, point))
}

/// The number that follows a name at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    lines.find_map(|mut words| (words.next() == Some(name)).then(|| words.next()?.parse().ok())?)
}

/// The time in which some thread stalled.
fn stalled(pressure: &str) -> Option<Duration> {
    let some = pressure.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = some.split(' ').find_map(|word| word.strip_prefix("total="))?;
    Some(Duration::from_micros(total.parse().ok()?))
}

/// Bytes of this process that are in memory, as the system counts them; `None` where it does not tell (it does on Linux).
pub fn process_resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(page_bytes() as u64)
}

/// The most bytes of this process that were ever in memory, as the system counts them; `None` where it does not tell (it does on Linux).
pub fn process_peak_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    field(&status, "VmHWM:")?.checked_mul(1024)
}

/// Bytes of a page of memory.
pub(crate) fn page_bytes() -> usize {
    #[cfg(unix)]
    return rustix::param::page_size();
    #[cfg(not(unix))]
    4096
}

#[cfg(test)]
mod tests {
    use super::*;
    use tempfile::TempDir;

    const MEMINFO: &str = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:    9000 kB\n";
    const PRESSURE: &str =
        "some avg10=1.50 avg60=0.00 avg300=0.00 total=2500000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=7\n";

    /// A system with these files.
    fn system(files: &[(&str, &str)]) -> TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, contents) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        root
    }

    fn read(files: &[(&str, &str)]) -> Reading {
        Sensors::below(system(files).path()).read()
    }

    fn reading(available: u64, limit: u64, stalled_ms: Option<u64>) -> Reading {
        let stalled = stalled_ms.map(Duration::from_millis);
        Reading { available_bytes: Some(available), limit_bytes: Some(limit), stalled }
    }

    #[test]
    fn nothing_is_known_where_there_are_no_files() {
        assert_eq!(read(&[]), Reading::default());
        assert_eq!(
            read(&[("proc/meminfo", "MemTotal: many kB\n"), ("proc/pressure/memory", "some\n")]),
            Reading::default()
        );
    }

    #[test]
    fn machine_without_control_groups_has_what_is_available() {
        let files = [("proc/meminfo", MEMINFO), ("proc/pressure/memory", PRESSURE)];
        assert_eq!(read(&files), reading(9000 << 10, 16000 << 10, Some(2500)));
    }

    #[test]
    fn limit_of_version_2_counts_less_what_is_in_use_without_file_cache() {
        let dir = "sys/fs/cgroup/user.slice/model";
        let at = |name: &str| format!("{dir}/{name}");
        let files = |max: &'static str, high: &'static str, above: &'static str| {
            read(&[
                ("proc/meminfo", MEMINFO),
                ("proc/pressure/memory", PRESSURE),
                ("proc/self/cgroup", "0::/user.slice/model\n"),
                ("proc/self/mountinfo", "30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"),
                (&at("memory.max"), max),
                (&at("memory.high"), high),
                (&at("memory.current"), "3000000\n"),
                (&at("memory.stat"), "anon 5\ninactive_file 400000\nactive_file 100000\n"),
                (&at("memory.pressure"), "some avg10=0.00 avg60=0.00 avg300=0.00 total=9000\n"),
                ("sys/fs/cgroup/user.slice/memory.max", above),
                ("sys/fs/cgroup/user.slice/memory.current", "3500000\n"),
            ])
        };
        assert_eq!(files("4000000\n", "max\n", "max\n"), reading(1_500_000, 4_000_000, Some(9)));
        assert_eq!(files("4000000\n", "3600000\n", "max\n"), reading(1_100_000, 3_600_000, Some(9)));
        assert_eq!(files("4000000\n", "max\n", "3600000\n"), reading(100_000, 3_600_000, Some(9)));
        assert_eq!(files("2000000\n", "max\n", "max\n"), reading(0, 2_000_000, Some(9)), "already above the limit");
        assert_eq!(files("max\n", "max\n", "max\n"), reading(9000 << 10, 16000 << 10, Some(9)));
    }

    #[test]
    fn limit_of_version_1_is_found_beside_other_hierarchies() {
        let mounts = "20 18 0:17 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      21 20 0:18 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                      22 20 0:19 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                      23 20 0:20 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
        let at = |limit: &'static str| {
            read(&[
                ("proc/meminfo", MEMINFO),
                ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/a\n"),
                ("proc/self/mountinfo", mounts),
                ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", limit),
                ("sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "5000000\n"),
                (
                    "sys/fs/cgroup/memory/a/b/memory.stat",
                    "inactive_file 1\ntotal_inactive_file 2000000\ntotal_active_file 500000\n",
                ),
                ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
                ("sys/fs/cgroup/memory/memory.usage_in_bytes", "99000000\n"),
            ])
        };
        assert_eq!(at("6000000\n"), reading(3_500_000, 6_000_000, None));
        assert_eq!(at("9223372036854771712\n"), reading(9000 << 10, 16000 << 10, None));
    }

    #[test]
    fn group_of_a_container_is_found_where_only_it_is_mounted() {
        for (path, root) in [("/docker/f00", "/docker/f00"), ("/", "/"), ("/../other", "/"), ("/docker/f00", "/")] {
            let found = read(&[
                ("proc/self/cgroup", &format!("0::{path}\n")),
                ("proc/self/mountinfo", &format!("30 24 0:26 {root} /sys/fs/cgroup ro - cgroup2 cgroup rw\n")),
                ("sys/fs/cgroup/memory.max", "4000000\n"),
                ("sys/fs/cgroup/memory.current", "1000000\n"),
            ]);
            assert_eq!(found, reading(3_000_000, 4_000_000, None), "{path} with {root} mounted");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_tells() {
        let reading = Sensors::detect().read();
        let (available, limit) = (reading.available_bytes.unwrap(), reading.limit_bytes.unwrap());
        assert!(0 < available && available <= limit && limit < 1 << 50, "{reading:?}");
        let resident = process_resident_bytes().unwrap();
        // The system counts in batches.
        assert!(resident > 1 << 20 && process_peak_bytes().unwrap() + (1 << 20) > resident);
    }
}
