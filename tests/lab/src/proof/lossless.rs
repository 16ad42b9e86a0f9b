//! No packet is lost while something is disturbed.

use std::time::Duration;

use anyhow::{Result, bail, ensure};

use super::ready;
use crate::{Lab, agent::Agent, probe::Flow};

/// Kills and restarts agents under a flow of 1,000 packets per second; no packet is lost.
pub async fn restart(lab: &Lab, agents: &mut [Agent], from: &str, to: &str, family: usize) -> Result<String> {
    restart_under(lab, agents, from, to, family, 1000).await
}

/// Kills and restarts agents under a flow of `rate` packets per second; no packet is lost.
pub async fn restart_under(
    lab: &Lab,
    agents: &mut [Agent],
    from: &str,
    to: &str,
    family: usize,
    rate: u32,
) -> Result<String> {
    lossless(lab, &[(from, to)], family, rate, async || {
        let mut killed = Vec::new();
        for agent in agents.iter_mut() {
            agent.kill()?;
            killed.push(agent.node.name.clone());
        }
        for agent in agents.iter_mut() {
            agent.restart()?;
        }
        for agent in agents.iter() {
            ready(agent).await?;
        }
        Ok(format!("killed: {}", killed.join(", ")))
    })
    .await
}

/// Sends `rate` datagrams per second from a node's pod to that of another, for each of `pairs`, while `disturb` runs;
/// none is lost.
pub async fn lossless(
    lab: &Lab,
    pairs: &[(&str, &str)],
    family: usize,
    rate: u32,
    disturb: impl AsyncFnOnce() -> Result<String>,
) -> Result<String> {
    // The flows run longer than a short disturbance.
    let end = tokio::time::Instant::now() + Duration::from_secs(3);
    let mut flows = Vec::new();
    for (from, to) in pairs {
        let (from, to) = (lab.pod(from), lab.pod(to));
        flows.push(Flow::start(&from.ns, &to.ns, to.addresses()[family], rate)?);
    }
    let disturbed = disturb().await?;
    tokio::time::sleep_until(end).await;
    let (mut sent, mut lost, mut gap) = (0, Vec::new(), Duration::ZERO);
    for (flow, (from, to)) in flows.into_iter().zip(pairs) {
        let report = flow.stop().await?;
        ensure!(report.sent >= 2 * u64::from(rate), "only {} packets were sent from {from} to {to}", report.sent);
        if report.lost > 0 {
            lost.push(format!("{} of {} packets from {from} to {to} were lost", report.lost, report.sent));
        }
        sent += report.sent;
        gap = gap.max(report.longest_gap);
    }
    let gap = gap.as_secs_f64() * 1e3;
    if !lost.is_empty() {
        bail!("{}, longest gap {gap:.0} ms; {}; {disturbed}", lost.join(", "), discards(lab)?);
    }
    Ok(format!("{sent} packets sent, 0 lost, longest gap {gap:.0} ms; {disturbed}"))
}

/// Lists packets discarded by the stack and by devices: a full queue of the machine is not a defect of Raven.
fn discards(lab: &Lab) -> Result<String> {
    let mut summaries = Vec::new();
    for ns in lab.namespaces() {
        let script = "grep . /proc/net/dev | awk '$5 + $13 > 0 { print $1, $5, $13 }'; \
                      awk '/^Udp: [0-9]/ && $4 + $6 + $7 > 0 { print \"udp\", $4, $6, $7 }' /proc/net/snmp; \
                      awk '{ if ($2 != \"00000000\") print \"backlog\", $2 }' /proc/net/softnet_stat";
        let output = ns.sh(script)?;
        if !output.trim().is_empty() {
            summaries.push(format!("{}: {}", ns.name, output.trim().replace('\n', ", ")));
        }
    }
    Ok(format!("discarded by devices (received, sent), sockets and backlogs: {}", summaries.join("; ")))
}
