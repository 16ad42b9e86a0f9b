//! Removes a lab with a shell script. The script is written before anything else is created, so that a guardian process
//! or a person can run it after the lab's own process has ended.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::namespace::output;

/// Folder that contains the folders of all labs of this machine.
pub const LABS: &str = "/run/raven-lab";

/// Writes `down.sh`. The script is idempotent: it may run twice, concurrently, or on a partly built lab.
pub(crate) fn write_script(id: &str, dir: &Path, device: &str) -> Result<()> {
    let script = format!(
        r#"#!/bin/sh
# Removes the lab {id}: its processes, namespaces, mounts and files.
id={id} dir={dir} device={device}
cd /
pids() {{
  for ns in /run/netns/$id-*; do
    [ -e "$ns" ] && ip netns pids "${{ns##*/}}" 2>/dev/null
  done
}}
# A killed process takes a moment to exit, and new ones may have been started meanwhile.
tries=0
while all=$(pids); [ -n "$all" ] && [ $tries -lt 100 ]; do
  kill -9 $all 2>/dev/null
  tries=$((tries + 1))
  sleep 0.05
done
for mnt in "$dir"/nodes/*/mnt; do
  [ -e "$mnt" ] && umount "$mnt" 2>/dev/null
done
ip link del "$device" 2>/dev/null
for ns in /run/netns/$id-*; do
  [ -e "$ns" ] && ip netns del "${{ns##*/}}"
done
while umount -l "$dir" 2>/dev/null; do :; done
# Cgroups that containerd created for pods; rmdir fails for those in use.
find /sys/fs/cgroup -depth -type d -path '*/k8s.io*' -exec rmdir {{}} \; 2>/dev/null
rm -rf "$dir"
rmdir {LABS} 2>/dev/null
exit 0
"#,
        dir = dir.display(),
    );
    let path = dir.join("down.sh");
    fs::write(&path, script).with_context(|| format!("write {}", path.display()))
}

/// A process that outlives the lab's own process and removes the lab when that process has ended, for any reason.
#[derive(Debug)]
pub(crate) struct Guardian {
    child: Child,
}

impl Guardian {
    /// Starts the guardian. It detects the end of this process by end-of-file on its standard input.
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let script = r#"cat >/dev/null; [ -e "$0/keep" ] || [ ! -e "$0/down.sh" ] || exec sh "$0/down.sh""#;
        let child = Command::new("setsid")
            .args(["sh", "-c", script])
            .arg(dir)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start the guardian of the lab")?;
        Ok(Self { child })
    }

    /// Ends the guardian: it removes the lab, unless the lab is kept or already removed.
    pub(crate) fn release(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Runs a lab's `down.sh`, if it exists.
pub(crate) fn run_script(dir: &Path) -> Result<()> {
    let script = dir.join("down.sh");
    if !script.exists() {
        return Ok(());
    }
    output(Command::new("sh").arg(script)).map(drop)
}

/// A lab found on this machine.
#[derive(Debug)]
pub struct Found {
    /// ID of the lab.
    pub id: String,
    /// Folder of the lab.
    pub dir: PathBuf,
    /// Process ID of the running owner, if there is one.
    pub owner: Option<u32>,
}

/// Returns all labs of this machine, sorted by ID.
pub fn labs() -> Vec<Found> {
    let Ok(entries) = fs::read_dir(LABS) else {
        return Vec::new();
    };
    let mut found: Vec<Found> = entries
        .flatten()
        .map(|entry| Found {
            id: entry.file_name().to_string_lossy().into_owned(),
            owner: living_owner(&entry.path()),
            dir: entry.path(),
        })
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Removes one lab, regardless of its owner.
pub fn down(id: &str) -> Result<()> {
    let dir = Path::new(LABS).join(id);
    anyhow::ensure!(!id.contains('/') && dir.is_dir(), "lab {id} does not exist (see `cargo xtask lab list`)");
    run_script(&dir)?;
    // If its process ended before it wrote the script, the lab consists of its folder only.
    if dir.exists() { fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display())) } else { Ok(()) }
}

/// Removes all labs without a running owner, both kept ones and leftovers. Returns their IDs.
pub fn down_all() -> Result<Vec<String>> {
    let ownerless: Vec<String> = labs().into_iter().filter(|lab| lab.owner.is_none()).map(|lab| lab.id).collect();
    ownerless.iter().try_for_each(|id| down(id))?;
    Ok(ownerless)
}

/// Records this process as the owner: process ID and start time, because process IDs are reused.
pub(crate) fn own(dir: &Path) -> Result<()> {
    let pid = std::process::id();
    let started = start_time(pid).context("read this process's start time")?;
    Ok(fs::write(dir.join("owner"), format!("{pid} {started}"))?)
}

fn living_owner(dir: &Path) -> Option<u32> {
    let text = fs::read_to_string(dir.join("owner")).ok()?;
    let (pid, started) = text.split_once(' ')?;
    let pid = pid.parse().ok()?;
    (start_time(pid)? == started).then_some(pid)
}

/// Returns field 22 of /proc/PID/stat, counted from behind the command's name, which may contain spaces.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}
