//! A network namespace, created with `ip netns` and entered with `nsenter` (processes) or on
//! a separate thread (sockets).
//!
//! `ip netns exec` is not used: it remounts /sys and so hides cgroups and bpffs from the command.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

/// A network namespace of the lab; for a node, also its mount namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Name as listed by `ip netns list`.
    pub name: String,
    /// Path of the persisted mount namespace; nodes only.
    pub mount: Option<PathBuf>,
}

impl Namespace {
    /// Returns a handle; does not create the namespace.
    pub(crate) fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), mount: None }
    }

    /// Returns the path at which the namespace is mounted.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// Returns the command-line prefix that runs a command in the namespace.
    pub fn nsenter(&self) -> Vec<String> {
        let mut words = vec!["nsenter".to_owned(), format!("--net={}", self.path().display())];
        words.extend(self.mount.as_ref().map(|m| format!("--mount={}", m.display())));
        words
    }

    /// Returns a command that runs in the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let words = self.nsenter();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a command in the namespace and returns its standard output. The error contains its standard error.
    pub fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        output(self.command(program).args(args))
    }

    /// Runs a shell script in the namespace and returns its standard output.
    pub fn sh(&self, script: &str) -> Result<String> {
        output(self.command("sh").arg("-ec").arg(script))
    }

    /// Runs a batch of `ip` commands.
    pub fn ip(&self, batch: &str) -> Result<()> {
        feed(Command::new("ip").args(["-n", &self.name, "-batch", "-"]), batch)
            .with_context(|| format!("configure {} with:\n{batch}", self.name))
    }

    /// Loads nftables rules.
    pub fn nft(&self, rules: &str) -> Result<()> {
        feed(self.command("nft").args(["-f", "-"]), rules).with_context(|| format!("load into {}:\n{rules}", self.name))
    }

    /// Sets sysctls, named by paths under /proc/sys. A leading `?` skips a setting that the kernel does not have.
    pub(crate) fn sysctls(&self, settings: &[(&str, &str)]) -> Result<()> {
        let settings: Vec<(String, String)> =
            settings.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        // /proc/sys/net shows the namespace of the thread that opens it.
        self.within(move || settings.iter().try_for_each(|(name, value)| set_sysctl(name, value)))?
    }

    /// Runs `work` on a short-lived thread inside the namespace. Sockets created there stay in it.
    pub fn within<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let path = self.path();
        let name = self.name.clone();
        std::thread::Builder::new()
            .name(name.clone())
            .spawn(move || -> Result<T> {
                let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
                setns(&file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", path.display()))?;
                Ok(work())
            })?
            .join()
            .unwrap_or_else(|_| bail!("the thread in {name} panicked"))
    }

    /// Like [`Namespace::within`], for callers on a tokio runtime, which is not blocked.
    pub async fn within_async<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let here = self.clone();
        tokio::task::spawn_blocking(move || here.within(work)).await?
    }
}

fn set_sysctl(name: &str, value: &str) -> Result<()> {
    let (name, optional) = name.strip_prefix('?').map_or((name, false), |n| (n, true));
    let path = Path::new("/proc/sys").join(name);
    if optional && !path.exists() {
        return Ok(());
    }
    std::fs::write(&path, value).with_context(|| format!("set {name}={value}"))
}

/// Runs a command and returns its standard output. The error contains its standard error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let done = command.output().with_context(|| format!("start {command:?}"))?;
    if !done.status.success() {
        bail!("{command:?}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Runs a command with `input` as its standard input.
pub(crate) fn feed(command: &mut Command, input: &str) -> Result<()> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdin = child.stdin.take().context("the command has no standard input")?;
    // A program that stops reading early (a syntax error) closes the pipe; its message is more useful than EPIPE.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let done = child.wait_with_output()?;
    if !done.status.success() {
        bail!("{command:?}: {}: {}", done.status, String::from_utf8_lossy(&done.stderr).trim());
    }
    Ok(written?)
}
