//! Checks the kernel log: a warning in it is a failure.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Patterns of warnings that fail a test.
const COMPLAINTS: [&str; 9] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "general protection fault",
    "refcount_t:",
    "unregister_netdevice: waiting",
    "Call Trace:",
    "suspicious",
    "scheduling while atomic",
];

/// Returns all warnings since boot that the log still contains.
pub fn complaints() -> Result<Vec<String>> {
    let log = read()?;
    Ok(log.lines().filter(|line| COMPLAINTS.iter().any(|word| line.contains(word))).map(str::to_owned).collect())
}

/// Fails if the log contains a warning; otherwise returns a summary.
pub fn quiet() -> Result<String> {
    let lines = read()?.lines().count();
    let complaints = complaints()?;
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(format!("{lines} lines without a warning"))
}

fn read() -> Result<String> {
    let log = Command::new("dmesg").output().context("start dmesg")?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    ensure!(!log.is_empty(), "dmesg printed nothing");
    Ok(log)
}
