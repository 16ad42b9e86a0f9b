//! `diff(have, want)`: what to change so that the kernel has what the plan says. Pure.
//!
//! The order of the steps is part of the contract: nothing is sent where nobody expects it, and nothing that works stops
//! before its replacement is there. Admission first (who is in this pool, which peers may send what), then where packets
//! go (maps), then what sends packets there (routes); removal in the opposite order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use ipnet::IpNet;
use raven_common::tables::{Local, Node, Remote};

use crate::topology::{PresharedKey, PublicKey};

/// The part of the kernel's state that is sets of keyed things.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Our table.
    pub routes: BTreeMap<IpNet, Route>,
    /// WireGuard peers.
    pub peers: BTreeMap<PublicKey, Peer>,
    /// Maps `REMOTE4` and `REMOTE6`.
    pub remote: BTreeMap<IpNet, Remote>,
    /// Maps `LOCAL4` and `LOCAL6`.
    pub local: BTreeMap<IpNet, Local>,
    /// Map `NODES`.
    pub nodes: BTreeMap<Ipv4Addr, Node>,
}

/// One of our devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// `raven0`.
    Overlay,
    /// `raven-wg0`.
    Tunnel,
}

/// A route of our table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub device: Device,
    /// Source of host processes' packets.
    pub source: Option<IpAddr>,
    /// Bytes.
    pub mtu: u32,
}

/// A WireGuard peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Where it is: configured in a plan, learned or configured in the kernel.
    pub endpoint: Option<SocketAddr>,
    /// What it may send.
    pub allowed: BTreeSet<IpNet>,
    /// Seconds.
    pub keepalive: Option<u16>,
    /// The cluster's, where it has one.
    pub preshared: Option<PresharedKey>,
    /// It has a session now (a handshake that is not older than 180 s). Never set in a plan.
    pub alive: bool,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Admit a node of the pool.
    PutNode(Ipv4Addr, Node),
    /// Say which node has a prefix.
    PutLocal(IpNet, Local),
    /// Make a peer or change it. What one has too much is taken away by [`Step::TakePrefixes`].
    PutPeer(PublicKey, Peer),
    /// Say where a remote prefix goes.
    PutRemote(IpNet, Remote),
    /// Make or replace a route.
    PutRoute(IpNet, Route),
    /// The opposites.
    DeleteRoute(IpNet),
    /// See [`Step::DeleteRoute`].
    DeleteRemote(IpNet),
    /// Take prefixes from a peer that no other peer gets (one that another gets leaves it by that).
    TakePrefixes(PublicKey, BTreeSet<IpNet>),
    /// See [`Step::DeleteRoute`].
    DeletePeer(PublicKey),
    /// See [`Step::DeleteRoute`].
    DeleteLocal(IpNet),
    /// See [`Step::DeleteRoute`].
    DeleteNode(Ipv4Addr),
}

/// See the module's text.
pub fn diff(have: &State, want: &State) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(puts(&have.nodes, &want.nodes).map(|(k, v)| Step::PutNode(*k, *v)));
    steps.extend(puts(&have.local, &want.local).map(|(k, v)| Step::PutLocal(*k, *v)));
    steps.extend(want.peers.iter().filter_map(|(key, peer)| put_peer(*key, have.peers.get(key), peer)));
    steps.extend(puts(&have.remote, &want.remote).map(|(k, v)| Step::PutRemote(*k, *v)));
    steps.extend(puts(&have.routes, &want.routes).map(|(k, v)| Step::PutRoute(*k, *v)));
    steps.extend(gone(&have.routes, &want.routes).map(|k| Step::DeleteRoute(*k)));
    steps.extend(gone(&have.remote, &want.remote).map(|k| Step::DeleteRemote(*k)));
    steps.extend(taken(&have.peers, &want.peers));
    steps.extend(gone(&have.peers, &want.peers).map(|k| Step::DeletePeer(*k)));
    steps.extend(gone(&have.local, &want.local).map(|k| Step::DeleteLocal(*k)));
    steps.extend(gone(&have.nodes, &want.nodes).map(|k| Step::DeleteNode(*k)));
    steps
}

fn puts<'a, K: Ord, V: PartialEq>(have: &'a BTreeMap<K, V>, want: &'a BTreeMap<K, V>) -> impl Iterator<Item = (&'a K, &'a V)> {
    want.iter().filter(|(k, v)| have.get(k) != Some(v))
}

fn gone<'a, K: Ord, V>(have: &'a BTreeMap<K, V>, want: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    have.keys().filter(|k| !want.contains_key(k))
}

fn taken(have: &BTreeMap<PublicKey, Peer>, want: &BTreeMap<PublicKey, Peer>) -> impl Iterator<Item = Step> {
    let kept: BTreeSet<IpNet> = want.values().flat_map(|peer| &peer.allowed).copied().collect();
    have.iter().filter(|(key, _)| want.contains_key(key)).filter_map(move |(key, peer)| {
        let taken: BTreeSet<IpNet> = peer.allowed.difference(&kept).copied().collect();
        (!taken.is_empty()).then_some(Step::TakePrefixes(*key, taken))
    })
}

/// A peer's endpoint is what it was last heard from while its session lives: a configured one is merely older. Only a
/// peer that is silent is sent back to its configured endpoint.
fn put_peer(key: PublicKey, have: Option<&Peer>, want: &Peer) -> Option<Step> {
    let Some(have) = have else { return Some(Step::PutPeer(key, want.clone())) };
    let endpoint = if have.alive { have.endpoint.or(want.endpoint) } else { want.endpoint.or(have.endpoint) };
    let same = Peer { endpoint, alive: have.alive, ..want.clone() } == *have;
    (!same).then(|| Step::PutPeer(key, Peer { endpoint, ..want.clone() }))
}

#[cfg(test)]
mod tests;
