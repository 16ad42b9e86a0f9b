//! The GatewayNode of this node: created when the node is elected (for L3, L7 or both), or its pool has encryption; kept up to
//! date, and deleted otherwise.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{
    Api, Client,
    api::{DeleteParams, Patch, PatchParams},
};
use raven_api::{
    GatewayNode, GatewayNodeStatus, MANAGER_AGENT,
    condition::{self, ConditionType, Verdict},
    gateway_node::{GatewayNodeSpec, PeerStatus, ProxyStatus},
};
use tokio::sync::watch;

use super::connected::Connected;
use crate::{
    apply::Report,
    proxy::ProxyReport,
    state::Peer,
    topology::PublicKey,
    tunnel::{Backend, Tunnel},
};

/// Interval at which peers are read.
const PERIOD: Duration = Duration::from_secs(10);
/// Minimum age of the status before handshake times alone cause a write: they are informative only.
const REFRESH: Duration = Duration::from_secs(1800);
/// Minimum age before changes of peers alone cause a write, per peer: with a thousand sites some peer always changes,
/// and the list is long.
const PEER: Duration = Duration::from_millis(100);
/// Peers that are listed at most: etcd limits an object to 1.5 MiB, which ten thousand peers exceed.
const LISTED: usize = 256;
/// Maximum of the sum over all peers.
const PEERS: Duration = Duration::from_secs(60);

/// The last report of the reconciler, and the tunnel on a gateway node.
pub type Latest = Option<(Arc<Report>, Option<Tunnel>)>;

/// Publishes until the process ends. A failure is logged and retried in the next period.
///
/// `exists`: whether the API server has the object, from the agent's watch, so that a deleted one is created again.
pub async fn run(
    client: Client,
    node: String,
    mut latest: watch::Receiver<Latest>,
    mut proxy: watch::Receiver<Option<ProxyReport>>,
    exists: watch::Receiver<Option<bool>>,
) {
    let mut publisher = Publisher {
        api: Api::all(client),
        node,
        spec: None,
        status: None,
        written: None,
        tunnel: Connected::tunnel(),
        proxy: Connected::proxy(),
    };
    let mut period = tokio::time::interval(PERIOD);
    loop {
        tokio::select! {
            changed = latest.changed() => if changed.is_err() { return },
            Ok(()) = proxy.changed() => {}
            _ = period.tick() => {
                if publisher.spec.is_some() && *exists.borrow() == Some(false) {
                    publisher.reset();
                }
            }
        }
        let Some((report, tunnel)) = latest.borrow_and_update().clone() else { continue };
        let proxied = proxy.borrow_and_update().clone();
        if let Err(e) = publisher.publish(&report, tunnel, proxied).await {
            tracing::warn!(node = publisher.node, error = %e, "cannot publish the GatewayNode; retrying");
        }
    }
}

struct Publisher {
    api: Api<GatewayNode>,
    node: String,
    spec: Option<GatewayNodeSpec>,
    status: Option<GatewayNodeStatus>,
    written: Option<tokio::time::Instant>,
    tunnel: Connected,
    proxy: Connected,
}

/// Observed peers, with the age of their last handshake.
type Sessions = BTreeMap<PublicKey, (Peer, Option<Duration>)>;

impl Publisher {
    async fn publish(
        &mut self,
        report: &Report,
        tunnel: Option<Tunnel>,
        proxied: Option<ProxyReport>,
    ) -> Result<(), kube::Error> {
        if report.plan.tunnel.is_none() && proxied.is_none() {
            return self.withdraw().await;
        }
        self.publish_spec(spec(report, proxied.as_ref())).await?;
        let sessions: Sessions = match tunnel {
            Some(tunnel) => tunnel.sessions().await.unwrap_or_default(),
            None => Sessions::default(),
        };
        let old = self.status.as_ref().map(|s| s.conditions.clone()).unwrap_or_default();
        let verdicts = self.verdicts(report, &sessions, proxied.as_ref(), Instant::now());
        let proxy = proxied.map(|proxied| proxied.status);
        let status = status(
            report,
            &sessions,
            proxy,
            condition::merge(&old, &verdicts, None, Timestamp::now()),
            Timestamp::now(),
        );
        let age = self.written.map_or(Duration::MAX, |written| written.elapsed());
        if age > self.status.as_ref().map_or(Duration::ZERO, |old| minimum_age(old, &status)) {
            self.publish_status(status).await?;
        }
        Ok(())
    }

    fn verdicts(
        &mut self,
        report: &Report,
        sessions: &Sessions,
        proxied: Option<&ProxyReport>,
        now: Instant,
    ) -> Vec<Verdict> {
        // Without a keepalive an idle peer has no session, which is no fault. In a pool with encryption, nodes of the pool are
        // peers, too.
        let plan = &report.plan;
        let inside =
            |key: &PublicKey| plan.peer_names.get(key).is_some_and(|name| Some(&name.gateway) == plan.pool.as_ref());
        let kept = || sessions.iter().filter(|(key, (peer, _))| peer.keepalive.is_some() && !inside(key));
        let peers = (kept().filter(|(_, (peer, _))| peer.alive).count(), kept().count());
        let connections = proxied.map_or((0, 0), |proxied| (proxied.status.tunnels.len(), proxied.dials));
        let connected = [self.tunnel.verdict(peers, now), self.proxy.verdict(connections, now)];
        std::iter::once(verdict(report)).chain(connected.into_iter().flatten()).collect()
    }

    async fn publish_spec(&mut self, spec: GatewayNodeSpec) -> Result<(), kube::Error> {
        if self.spec.as_ref() == Some(&spec) {
            return Ok(());
        }
        let object = serde_json::json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode",
                                         "metadata": { "name": self.node }, "spec": spec });
        self.api.patch(&self.node, &PatchParams::apply(MANAGER_AGENT).force(), &Patch::Apply(object)).await?;
        tracing::info!(node = self.node, gateway = spec.gateway, key = spec.public_key, "published the GatewayNode");
        self.spec = Some(spec);
        Ok(())
    }

    async fn publish_status(&mut self, status: GatewayNodeStatus) -> Result<(), kube::Error> {
        let object = serde_json::json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode",
                                         "metadata": { "name": self.node }, "status": status });
        self.api.patch_status(&self.node, &PatchParams::apply(MANAGER_AGENT).force(), &Patch::Apply(object)).await?;
        self.status = Some(status);
        self.written = Some(tokio::time::Instant::now());
        Ok(())
    }

    /// Forgets what was written, so that the next run writes everything.
    fn reset(&mut self) {
        (self.spec, self.status, self.written) = (None, None, None);
    }

    /// Deletes the GatewayNode of a node that is not elected: once per change of its role, and once after a start.
    async fn withdraw(&mut self) -> Result<(), kube::Error> {
        if self.spec.is_none() && self.written.is_some() {
            return Ok(());
        }
        match self.api.delete(&self.node, &DeleteParams::default()).await {
            Ok(_) => tracing::info!(node = self.node, "this node is not elected; deleted its GatewayNode"),
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            Err(e) => return Err(e),
        }
        (self.spec, self.status, self.written) = (None, None, Some(tokio::time::Instant::now()));
        self.tunnel.reset();
        self.proxy.reset();
        Ok(())
    }
}

fn spec(report: &Report, proxied: Option<&ProxyReport>) -> GatewayNodeSpec {
    let has_tunnel = report.plan.tunnel.is_some();
    GatewayNodeSpec {
        gateway: report
            .plan
            .pool
            .clone()
            .or_else(|| proxied.map(|proxied| proxied.gateway.clone()))
            .unwrap_or_default(),
        public_key: has_tunnel.then(|| report.public_key.to_string()),
        public_key_proof: has_tunnel.then(|| report.key_proof.clone()),
        listen_port: report.plan.tunnel.as_ref().map(|t| i32::from(t.port)),
        addresses: Some(report.plan.config.node)
            .filter(|a| !a.is_unspecified())
            .map(|a| a.to_string())
            .into_iter()
            .collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn status(
    report: &Report,
    sessions: &Sessions,
    proxy: Option<ProxyStatus>,
    conditions: Vec<Condition>,
    now: Timestamp,
) -> GatewayNodeStatus {
    // Those without a session first: they matter, and the list is bounded.
    let (live, dead): (Vec<_>, Vec<_>) = sessions.iter().partition(|(_, (peer, _))| peer.alive);
    let live_count = live.len();
    let mut list: Vec<PeerStatus> = dead
        .into_iter()
        .chain(live)
        .filter_map(|(key, (peer, age))| {
            let name = report.plan.peer_names.get(key)?;
            let handshake = age.and_then(|age| now.checked_sub(age).ok());
            Some(PeerStatus {
                node_name: name.node.clone(),
                gateway: name.gateway.clone(),
                observed_endpoint: peer.endpoint.map(|e| e.to_string()),
                last_handshake: handshake.map(Time),
            })
        })
        .collect();
    list.truncate(LISTED);
    list.sort_by(|a, b| a.node_name.cmp(&b.node_name));
    GatewayNodeStatus {
        wireguard_backend: report.backend.map(Backend::as_str).map(str::to_owned),
        dataplane_tier: report.tier.map(str::to_owned),
        tunnel_mtu: report.plan.tunnel.as_ref().and_then(|t| i32::try_from(t.mtu).ok()),
        peer_summary: Some(format!("{live_count}/{}", sessions.len())),
        peers: list,
        proxy,
        conditions,
    }
}

fn verdict(report: &Report) -> Verdict {
    let (ok, reason) = if !report.failures.is_empty() {
        (false, "ApplyFailed")
    } else if !report.surroundings.is_empty() {
        (false, "Surroundings")
    } else if !report.plan.problems.is_empty() {
        (false, "Incomplete")
    } else {
        (true, "Forwarding")
    };
    let tier = report.tier_reason.as_ref().map(|r| format!(" (not the fastest tier: {r})")).unwrap_or_default();
    let message = if ok {
        format!("the dataplane is as planned{tier}")
    } else {
        summary(&report.complaints().collect::<Vec<_>>())
    };
    Verdict { type_: ConditionType::Ready, ok, reason, message }
}

/// Complaints in a condition's message.
const SHOWN: usize = 3;
/// Characters of each.
const LENGTH: usize = 400;

/// The most important complaints as a numbered list, and the number of the others.
fn summary(complaints: &[String]) -> String {
    let cut = |text: &String| text.chars().take(LENGTH).collect::<String>();
    let [only] = complaints else {
        let shown = complaints
            .iter()
            .take(SHOWN)
            .enumerate()
            .map(|(n, text)| format!("({}) {}", n + 1, cut(text)))
            .collect::<Vec<_>>();
        let rest = match complaints.len().saturating_sub(SHOWN) {
            0 => String::new(),
            rest => format!("; and {rest} more: GET /status on the agent's metrics port lists all"),
        };
        return format!("{} problems: {}{rest}", complaints.len(), shown.join("; "));
    };
    cut(only)
}

/// The minimum age of `old` before `new` is written.
fn minimum_age(old: &GatewayNodeStatus, new: &GatewayNodeStatus) -> Duration {
    let without_handshakes = |status: &GatewayNodeStatus| {
        let mut status = status.clone();
        status.peers.iter_mut().for_each(|p| p.last_handshake = None);
        status
    };
    let without_peers =
        |status: &GatewayNodeStatus| GatewayNodeStatus { peers: Vec::new(), peer_summary: None, ..status.clone() };
    match (without_handshakes(old), without_handshakes(new)) {
        (old, new) if old == new => REFRESH,
        (old, new) if without_peers(&old) == without_peers(&new) => {
            PEERS.min(PEER * u32::try_from(new.peers.len()).unwrap_or(u32::MAX))
        }
        _ => Duration::ZERO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(peers: usize, live: usize) -> GatewayNodeStatus {
        let peer = |n: usize| PeerStatus {
            node_name: format!("n{n}"),
            gateway: "site".to_owned(),
            observed_endpoint: Some(format!("192.0.2.1:{n}")),
            last_handshake: Some(Time(Timestamp::UNIX_EPOCH)),
        };
        GatewayNodeStatus {
            peer_summary: Some(format!("{live}/{peers}")),
            peers: (0..peers).map(peer).collect(),
            ..Default::default()
        }
    }

    #[test]
    fn important_changes_are_written_at_once_and_handshakes_rarely() {
        let old = status(2, 2);
        let mut handshake = old.clone();
        handshake.peers[0].last_handshake = Some(Time(Timestamp::MAX));
        assert_eq!(minimum_age(&old, &handshake), REFRESH);
        assert_eq!(minimum_age(&old, &status(2, 1)), 2 * PEER, "a small cluster is updated at once");
        assert_eq!(minimum_age(&status(5000, 1), &status(5000, 2)), PEERS);
        let other_tier = GatewayNodeStatus { dataplane_tier: Some("tc".to_owned()), ..status(2, 1) };
        assert_eq!(minimum_age(&old, &other_tier), Duration::ZERO);
    }

    #[test]
    fn message_lists_three_problems_and_counts_the_rest() {
        let complaints: Vec<String> = (0..12).map(|n| format!("problem {n}{}", "x".repeat(1000))).collect();
        assert_eq!(summary(&complaints[..1]).len(), LENGTH);
        let message = summary(&complaints);
        assert!(
            message.starts_with("12 problems: (1) problem 0")
                && message.contains("; (3) problem 2")
                && !message.contains("problem 3")
        );
        assert!(message.ends_with("; and 9 more: GET /status on the agent's metrics port lists all"), "{message}");
        assert!(message.len() < 1500, "{}", message.len());
    }
}
