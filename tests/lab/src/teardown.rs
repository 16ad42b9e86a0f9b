//! Takes a lab away: by one shell script that is written before anything else is made, so that a guardian process or a person can
//! run it when the lab's own process is gone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use crate::namespace::output;

/// Where all labs of this machine keep their folders.
pub const LABS: &str = "/run/raven-lab";

/// Writes `down.sh`. It may run twice, at once or after half of the lab was made.
pub(crate) fn write_script(id: &str, dir: &Path, device: &str) -> Result<()> {
    let script = format!(
        r#"#!/bin/sh
# Takes the lab {id} away: its processes, namespaces, mounts and files.
id={id} dir={dir} device={device}
cd /
pids() {{
  for ns in /run/netns/$id-*; do
    [ -e "$ns" ] && ip netns pids "${{ns##*/}}" 2>/dev/null
  done
}}
# A killed process takes a moment to be gone; a new one may have been born meanwhile.
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
# What containerd made for pods; one that somebody uses stays.
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

/// A process that outlives the lab's own and cleans up when that one is gone, however it went.
#[derive(Debug)]
pub(crate) struct Guardian {
    child: Child,
}

impl Guardian {
    /// Starts it. It notices the end of this process by the end of its standard input.
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

    /// Lets it go: it acts on what it finds (`keep`, or a lab to take away).
    pub(crate) fn release(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// Runs a lab's `down.sh`, if it is there.
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
    /// Its id.
    pub id: String,
    /// Its folder.
    pub dir: PathBuf,
    /// The living process that owns it, if there is one.
    pub owner: Option<u32>,
}

/// All labs of this machine.
pub fn labs() -> Vec<Found> {
    let Ok(entries) = fs::read_dir(LABS) else {
        return Vec::new();
    };
    let mut found: Vec<Found> = entries
        .flatten()
        .map(|entry| Found { id: entry.file_name().to_string_lossy().into_owned(), owner: living_owner(&entry.path()), dir: entry.path() })
        .collect();
    found.sort_by(|a, b| a.id.cmp(&b.id));
    found
}

/// Takes one lab away, whoever owns it.
pub fn down(id: &str) -> Result<()> {
    let dir = Path::new(LABS).join(id);
    anyhow::ensure!(!id.contains('/') && dir.is_dir(), "there is no lab {id} (see `cargo xtask lab list`)");
    run_script(&dir)?;
    // A lab whose process died before it wrote the script has nothing but its folder.
    if dir.exists() { fs::remove_dir_all(&dir).with_context(|| format!("remove {}", dir.display())) } else { Ok(()) }
}

/// Takes all labs away that no living process owns: kept ones and leftovers. Gives their ids.
pub fn down_all() -> Result<Vec<String>> {
    let ownerless: Vec<String> = labs().into_iter().filter(|lab| lab.owner.is_none()).map(|lab| lab.id).collect();
    ownerless.iter().try_for_each(|id| down(id))?;
    Ok(ownerless)
}

/// Marks this process as the owner: by id and start time, so that a later process with the same id is not taken for it.
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

/// Field 22 of /proc/PID/stat, counted after the command's name, which may hold anything.
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(19).map(str::to_owned)
}
