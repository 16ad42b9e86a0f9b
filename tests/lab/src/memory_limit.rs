//! A limit of a program's memory, as a container has it: a control group.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

/// A control group with a limit. The group of version 2 needs the controller `memory` in the root group.
#[derive(Debug)]
pub struct MemoryLimit {
    folder: PathBuf,
    /// The file in which a line `oom_kill N` counts killed processes.
    events: &'static str,
}

impl MemoryLimit {
    /// Creates a group with a name of this process. Fails where no version of the controller is available.
    pub fn new(name: &str, bytes: u64) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        let (parent, limit, events) = if root.join("memory").exists() {
            (root.join("memory"), "memory.limit_in_bytes", "memory.oom_control")
        } else if fs::read_to_string(root.join("cgroup.subtree_control")).is_ok_and(|on| on.contains("memory")) {
            (root.to_path_buf(), "memory.max", "memory.events")
        } else {
            bail!("there is no control group for memory");
        };
        let group = Self { folder: parent.join(format!("raven-{}-{name}", std::process::id())), events };
        fs::create_dir_all(&group.folder).with_context(|| format!("create {}", group.folder.display()))?;
        fs::write(group.folder.join(limit), bytes.to_string()).context("set the limit")?;
        Ok(group)
    }

    /// The file to which a process writes its ID to enter the group.
    pub fn entrance(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// The number of processes that were killed because of the limit.
    pub fn killed(&self) -> Result<u64> {
        let events = fs::read_to_string(self.folder.join(self.events))?;
        let line = events.lines().find_map(|line| line.strip_prefix("oom_kill ")).context("no line oom_kill")?;
        Ok(line.trim().parse()?)
    }

    /// Memory of processes and the kernel's on their behalf (maps, sockets), without cached files, in MB.
    pub fn used_mb(&self) -> Result<f64> {
        let stat = fs::read_to_string(self.folder.join("memory.stat"))?;
        let field = |name: &str| {
            let mut words = stat.lines().filter_map(|line| line.split_once(' '));
            words.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<f64>().ok())
        };
        let kernel = fs::read_to_string(self.folder.join("memory.kmem.usage_in_bytes")).ok();
        let kernel = kernel.and_then(|text| text.trim().parse().ok()).or_else(|| field("kernel")).unwrap_or(0.0);
        let processes = field("total_rss").or_else(|| field("anon")).context("no resident memory")?;
        Ok((processes + kernel) / 1e6)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Fails while a process is in it; it goes with the machine.
        let _ = fs::remove_dir(&self.folder);
    }
}
