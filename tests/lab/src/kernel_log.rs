//! What the kernel says of itself: a warning there is a failure, whatever else passed.

use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What no kernel should say.
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

/// Its complaints since boot, as far as its log reaches back.
pub fn complaints() -> Result<Vec<String>> {
    let log = read()?;
    Ok(log.lines().filter(|line| COMPLAINTS.iter().any(|word| line.contains(word))).map(str::to_owned).collect())
}

/// Fails if it has complained of anything.
pub fn quiet() -> Result<String> {
    let lines = read()?.lines().count();
    let complaints = complaints()?;
    ensure!(complaints.is_empty(), "{}", complaints.join("\n"));
    Ok(format!("{lines} lines, no warning among them"))
}

fn read() -> Result<String> {
    let log = Command::new("dmesg").output().context("start dmesg")?;
    let log = String::from_utf8_lossy(&log.stdout).into_owned();
    ensure!(!log.is_empty(), "dmesg says nothing");
    Ok(log)
}
