//! Throughput between two nodes of a lab by iperf3, each node on a core of its own.

use std::{process::Command, time::Duration};

use anyhow::{Context, Result, ensure};
use raven_tests::{Lab, Node, eventually, namespace::Namespace, process::Process};
use serde_json::Value;

/// Starts the server and waits until it listens.
pub(crate) async fn listen(lab: &Lab, node: &Node) -> Result<Process> {
    let mut listener = node.ns.command("iperf3");
    listener.arg("-s");
    let process = Process::start("iperf3", &lab.logs(), listener)?;
    eventually(Duration::from_secs(10), "iperf3 is listening", async || {
        ensure!(!node.ns.sh("ss -Hltn 'sport = :5201'")?.is_empty(), "port 5201 is not open yet");
        Ok(())
    })
    .await?;
    Ok(process)
}

/// Pins all processes of a node to a core.
pub(crate) fn pin(node: &Node, core: u8) -> Result<()> {
    let script = format!("for pid in $(ip netns pids {}); do taskset -a -c -p {core} $pid; done", node.ns.name);
    let pinned = node.ns.sh(&script).with_context(|| format!("pin {} to a core", node.name))?;
    ensure!(
        pinned.lines().any(|line| line.ends_with(&format!("new affinity list: {core}"))),
        "{} is not pinned to its core: {pinned}",
        node.name
    );
    Ok(())
}

/// Runs the client for a number of seconds. Returns the report's `end`.
pub(crate) async fn run(from: &Namespace, to: &str, seconds: &str, arguments: &[&str]) -> Result<Value> {
    let mut command: Command = from.command("iperf3");
    command.args(["-J", "-A", "0,1", "-t", seconds, "-c", to]).args(arguments);
    let done = tokio::process::Command::from(command).output().await.context("start iperf3")?;
    let mut report: Value = serde_json::from_slice(&done.stdout).context("parse iperf3's output as JSON")?;
    ensure!(report["error"].is_null(), "iperf3 to {to}: {}", report["error"]);
    Ok(report["end"].take())
}

/// Throughput that arrived, in Mbit/s, by the report's `end`.
pub(crate) fn mbit(end: &Value) -> Result<f64> {
    number(&end["sum_received"]["bits_per_second"]).map(|bits| bits / 1e6)
}

/// A number of the report.
pub(crate) fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("iperf3's report has {value} instead of a number"))
}
