//! Long-running programs of the lab. Their output goes to a log file; they end with the lab, unless it is kept.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, anyhow};

/// A running program.
#[derive(Debug)]
pub struct Process {
    /// Name for messages and the log file.
    pub name: String,
    /// Path of the log file; a restart appends to it.
    pub log: PathBuf,
    child: Child,
}

impl Process {
    /// Starts `command` with its output in `<logs>/<name>.log`. It gets its own process group, so that Ctrl-C
    /// reaches the lab only.
    pub fn start(name: impl Into<String>, logs: &Path, mut command: Command) -> Result<Self> {
        let name = name.into();
        let log = logs.join(format!("{name}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("start {name}: {command:?}"))?;
        Ok(Self { name, log, child })
    }

    /// Returns the process ID. nsenter executes the program in place, so it is the program's own ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the program with SIGKILL and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().with_context(|| format!("kill {}", self.name))?;
        self.child.wait()?;
        Ok(())
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: nix::sys::signal::Signal) -> Result<()> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid())?);
        nix::sys::signal::kill(pid, signal).with_context(|| format!("signal {}", self.name))
    }

    /// Returns the exit status if the program has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Waits for the program's end and returns its exit status.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        Ok(self.child.wait()?)
    }

    /// Fails with the end of the log if the program is not running.
    pub fn ensure_running(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => {
                Err(anyhow!("{} ended ({status}); the end of {}:\n{}", self.name, self.log.display(), tail(&self.log)))
            }
        }
    }

    /// Returns the output so far.
    pub fn output(&self) -> Result<String> {
        std::fs::read_to_string(&self.log).with_context(|| format!("read {}", self.log.display()))
    }
}

/// Returns the last 3,000 bytes of a log.
pub(crate) fn tail(log: &Path) -> String {
    const BYTES: u64 = 3000;
    let read = || -> std::io::Result<String> {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut text = Vec::new();
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_else(|error| format!("(cannot read the log: {error})"))
}

/// Returns a line of /proc/PID/status (`VmRSS`, `VmHWM`) in MB. `pid` may be `self`.
pub fn memory_mb(pid: impl std::fmt::Display, line: &str) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))
        .with_context(|| format!("read the status of process {pid}"))?;
    let kilobytes = status.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':')?.split_whitespace().next());
    let kilobytes: f64 =
        kilobytes.with_context(|| format!("the status of process {pid} has no line {line}"))?.parse()?;
    Ok(kilobytes / 1024.0)
}
