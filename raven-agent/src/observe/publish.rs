//! The GatewayNode of this node: made when it is elected (for L3, L7 or both), kept up to date, removed when it is not elected any more.

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
    diff::Peer,
    plan::Role,
    topology::{Inputs, PublicKey},
    tunnel::{Backend, Tunnel},
};

/// How often peers are looked at.
const PERIOD: Duration = Duration::from_secs(10);
/// How often the status is written though nothing changed but handshakes: they are for people, and every agent of the cluster is told.
const REFRESH: Duration = Duration::from_secs(1800);
/// How often where only peers changed, for each of them, and at most: of a thousand sites one always comes or goes, and the list is long.
const PEER: Duration = Duration::from_millis(100);
const PEERS: Duration = Duration::from_secs(60);

/// What the reconciler tells everybody after a run.
pub type Latest = Option<(Arc<Report>, Option<Tunnel>)>;

/// Publishes until the process ends. A failure is logged and tried again with the next period.
///
/// `seen`: what the API server has, by the agent's own watch: an announcement that somebody deleted is made again.
pub async fn run(
    client: Client,
    node: String,
    mut latest: watch::Receiver<Latest>,
    mut proxy: watch::Receiver<Option<Proxied>>,
    seen: watch::Receiver<Option<Inputs>>,
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
                let has = |inputs: &Inputs| inputs.gateway_nodes.iter().any(|n| n.metadata.name.as_deref() == Some(publisher.node.as_str()));
                if publisher.spec.is_some() && seen.borrow().as_ref().is_some_and(|inputs| !has(inputs)) {
                    publisher.forget();
                }
            }
        }
        let Some((report, tunnel)) = latest.borrow_and_update().clone() else { continue };
        let proxied = proxy.borrow_and_update().clone();
        if let Err(e) = publisher.publish(&report, tunnel, proxied).await {
            tracing::warn!("publish GatewayNode {}: {e}; trying again in {PERIOD:?}", publisher.node);
        }
    }
}

/// The L7 half's word.
#[derive(Clone, Debug, PartialEq)]
pub struct Proxied {
    /// For which Gateway.
    pub gateway: String,
    /// How it goes.
    pub status: ProxyStatus,
    /// With how many cloud nodes it should have tunnels; 0 in the cloud, which is dialled.
    pub dials: usize,
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

/// What is seen of the peers.
type Seen = BTreeMap<PublicKey, (Peer, Option<Duration>)>;

impl Publisher {
    async fn publish(&mut self, report: &Report, tunnel: Option<Tunnel>, proxied: Option<Proxied>) -> Result<(), kube::Error> {
        if report.plan.role != Role::Gateway && proxied.is_none() {
            return self.withdraw().await;
        }
        self.publish_spec(spec(report, proxied.as_ref())).await?;
        let seen: Seen = match tunnel {
            Some(tunnel) => tunnel.sessions().await.unwrap_or_default(),
            None => Seen::default(),
        };
        let old = self.status.as_ref().map(|s| s.conditions.clone()).unwrap_or_default();
        let verdicts = self.verdicts(report, &seen, proxied.as_ref(), Instant::now());
        let proxy = proxied.map(|proxied| proxied.status);
        let status = status(report, &seen, proxy, condition::merge(&old, &verdicts, None, Timestamp::now()), Timestamp::now());
        let age = self.written.map_or(Duration::MAX, |written| written.elapsed());
        if age > self.status.as_ref().map_or(Duration::ZERO, |old| patience(old, &status)) {
            self.publish_status(status).await?;
        }
        Ok(())
    }

    fn verdicts(&mut self, report: &Report, seen: &Seen, proxied: Option<&Proxied>, now: Instant) -> Vec<Verdict> {
        // Without a keepalive a session may be idle, and nothing is wrong.
        let kept = seen.values().filter(|(peer, _)| peer.keepalive.is_some());
        let sessions = (kept.clone().filter(|(peer, _)| peer.alive).count(), kept.count());
        let tunnels = proxied.map_or((0, 0), |proxied| (proxied.status.tunnels.len(), proxied.dials));
        let connected = [self.tunnel.verdict(sessions, now), self.proxy.verdict(tunnels, now)];
        std::iter::once(verdict(report)).chain(connected.into_iter().flatten()).collect()
    }

    async fn publish_spec(&mut self, spec: GatewayNodeSpec) -> Result<(), kube::Error> {
        if self.spec.as_ref() == Some(&spec) {
            return Ok(());
        }
        let object = serde_json::json!({ "apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode",
                                         "metadata": { "name": self.node }, "spec": spec });
        self.api.patch(&self.node, &PatchParams::apply(MANAGER_AGENT).force(), &Patch::Apply(object)).await?;
        tracing::info!(node = self.node, gateway = spec.gateway, key = spec.public_key, "announced");
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

    /// Nothing has been written: all is written anew.
    fn forget(&mut self) {
        (self.spec, self.status, self.written) = (None, None, None);
    }

    /// A node that is not elected has nothing to announce; once per change of role, and once after a start.
    async fn withdraw(&mut self) -> Result<(), kube::Error> {
        if self.spec.is_none() && self.written.is_some() {
            return Ok(());
        }
        match self.api.delete(&self.node, &DeleteParams::default()).await {
            Ok(_) => tracing::info!(node = self.node, "not elected: announcement withdrawn"),
            Err(kube::Error::Api(e)) if e.code == 404 => {}
            Err(e) => return Err(e),
        }
        (self.spec, self.status, self.written) = (None, None, Some(tokio::time::Instant::now()));
        self.tunnel.forget();
        self.proxy.forget();
        Ok(())
    }
}

fn spec(report: &Report, proxied: Option<&Proxied>) -> GatewayNodeSpec {
    GatewayNodeSpec {
        gateway: report.plan.pool.clone().or_else(|| proxied.map(|proxied| proxied.gateway.clone())).unwrap_or_default(),
        // Others make a peer of whoever has one.
        public_key: (report.plan.role == Role::Gateway).then(|| report.public_key.to_string()),
        listen_port: report.plan.tunnel.as_ref().map(|t| i32::from(t.port)),
        addresses: Some(report.plan.config.node).filter(|a| !a.is_unspecified()).map(|a| a.to_string()).into_iter().collect(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}

fn status(report: &Report, seen: &Seen, proxy: Option<ProxyStatus>, conditions: Vec<Condition>, now: Timestamp) -> GatewayNodeStatus {
    let mut list: Vec<PeerStatus> = seen
        .iter()
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
    list.sort_by(|a, b| a.node_name.cmp(&b.node_name));
    let live = seen.values().filter(|(peer, _)| peer.alive).count();
    GatewayNodeStatus {
        wireguard_backend: report.backend.map(Backend::as_str).map(str::to_owned),
        dataplane_tier: report.tier.map(str::to_owned),
        tunnel_mtu: report.plan.tunnel.as_ref().and_then(|t| i32::try_from(t.mtu).ok()),
        peer_summary: Some(format!("{live}/{}", seen.len())),
        peers: list,
        proxy,
        conditions,
    }
}

fn verdict(report: &Report) -> Verdict {
    let complaints: Vec<&str> = report.complaints().map(String::as_str).collect();
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
    let message = if ok { format!("the dataplane is as planned{tier}") } else { complaints.join("; ") };
    // The API server refuses longer ones.
    let message = message.chars().take(32_000).collect();
    Verdict { type_: ConditionType::Ready, ok, reason, message }
}

/// How old `old` may become where `new` is what would be written.
fn patience(old: &GatewayNodeStatus, new: &GatewayNodeStatus) -> Duration {
    let without_handshakes = |status: &GatewayNodeStatus| {
        let mut status = status.clone();
        status.peers.iter_mut().for_each(|p| p.last_handshake = None);
        status
    };
    let without_peers = |status: &GatewayNodeStatus| GatewayNodeStatus { peers: Vec::new(), peer_summary: None, ..status.clone() };
    match (without_handshakes(old), without_handshakes(new)) {
        (old, new) if old == new => REFRESH,
        (old, new) if without_peers(&old) == without_peers(&new) => PEERS.min(PEER * u32::try_from(new.peers.len()).unwrap_or(u32::MAX)),
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
        GatewayNodeStatus { peer_summary: Some(format!("{live}/{peers}")), peers: (0..peers).map(peer).collect(), ..Default::default() }
    }

    #[test]
    fn what_matters_is_written_at_once_peers_by_their_number_and_handshakes_rarely() {
        let old = status(2, 2);
        let mut shaken = old.clone();
        shaken.peers[0].last_handshake = Some(Time(Timestamp::MAX));
        assert_eq!(patience(&old, &shaken), REFRESH);
        assert_eq!(patience(&old, &status(2, 1)), 2 * PEER, "a small cluster sees it at once");
        assert_eq!(patience(&status(5000, 1), &status(5000, 2)), PEERS);
        let other_tier = GatewayNodeStatus { dataplane_tier: Some("tc".to_owned()), ..status(2, 1) };
        assert_eq!(patience(&old, &other_tier), Duration::ZERO);
    }
}
