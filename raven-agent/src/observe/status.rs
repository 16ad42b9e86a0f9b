//! The agent's full state as JSON, for `/status`.

use std::{collections::BTreeSet, net::IpAddr};

use serde::Serialize;

use crate::{apply::Report, proxy::ProxyReport, tunnel::Backend};

/// The body of `/status`.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Status<'a> {
    version: &'static str,
    /// `none`, `member` or `gateway`.
    role: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    gateway: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    wireguard: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tier_reason: Option<&'a str>,
    peers: usize,
    remote_prefixes: usize,
    /// Steps of the last run that failed.
    failures: Vec<String>,
    /// Settings and rules of other programs that stop packets.
    surroundings: &'a [String],
    /// Nodes of the pool that do not answer ARP.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    unresolved_neighbours: &'a BTreeSet<IpAddr>,
    /// Problems in the topology.
    problems: &'a [String],
    restored: u64,
    /// Seconds since the last run ended.
    age_seconds: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    proxy: Option<Proxy<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Proxy<'a> {
    ready: bool,
    message: &'a str,
    /// Cloud nodes with an established connection.
    connected: &'a [String],
}

/// Renders the state after the last run.
pub(super) fn render(report: &Report, proxy: Option<&ProxyReport>) -> String {
    let status = Status {
        version: env!("CARGO_PKG_VERSION"),
        role: report.plan.role.as_str(),
        gateway: report.plan.pool.as_deref(),
        wireguard: report.backend.map(Backend::as_str),
        tier: report.tier,
        tier_reason: report.tier_reason.as_deref(),
        peers: report.plan.state.peers.len(),
        remote_prefixes: report.plan.state.remote.len(),
        failures: report.failures.iter().map(ToString::to_string).collect(),
        surroundings: &report.surroundings,
        unresolved_neighbours: &report.neighbours.unresolved,
        problems: &report.plan.problems,
        restored: report.restored,
        age_seconds: report.ended.elapsed().as_secs(),
        proxy: proxy.map(|p| Proxy { ready: p.status.ready, message: &p.status.message, connected: &p.status.tunnels }),
    };
    serde_json::to_string_pretty(&status).unwrap_or_default() + "\n"
}
