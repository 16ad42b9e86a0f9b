//! `diff(have, want)`: the steps that bring the kernel from its observed state to the desired one. Pure.
//!
//! The order of the steps is part of the contract: no packet is sent to a node that does not accept it yet, and
//! nothing that works stops before its replacement is in place. Unreachable routes come first, so that no packet
//! leaves by another route. Then come admission (nodes of this pool, what each peer may send), the maps that direct
//! packets, and the routes that send packets there. Removal runs in the opposite order.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use raven_common::tables::{Local, Node, Remote};

use crate::{
    state::{Peer, Preshared, Route, State},
    topology::PublicKey,
};

/// One change to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Add an unreachable route.
    PutBarrier(IpNet),
    /// Set the address behind a stand-in.
    PutOuter6(Ipv4Addr, Ipv6Addr),
    /// Assign an IPv6 address to its node of the pool.
    PutNode6(Ipv6Addr, Ipv4Addr),
    /// Admit a node of the pool.
    PutNode(Ipv4Addr, Node),
    /// Assign a prefix of this pool to its node.
    PutLocal(IpNet, Local),
    /// Create or change a peer. Surplus prefixes are removed by [`Step::TakePrefixes`].
    PutPeer(PublicKey, Peer),
    /// Direct a remote prefix.
    PutRemote(IpNet, Remote),
    /// Create or replace a route.
    PutRoute(IpNet, Route),
    /// Delete a route.
    DeleteRoute(IpNet),
    /// Delete an unreachable route.
    DeleteBarrier(IpNet),
    /// Stop directing a remote prefix.
    DeleteRemote(IpNet),
    /// Remove prefixes from a peer that no other peer gets. A prefix that moves to another peer leaves the first one
    /// by that move.
    TakePrefixes(PublicKey, BTreeSet<IpNet>),
    /// Delete a peer.
    DeletePeer(PublicKey),
    /// Delete a prefix of this pool.
    DeleteLocal(IpNet),
    /// Delete a node from the pool.
    DeleteNode(Ipv4Addr),
    /// Delete an IPv6 address of a node of the pool.
    DeleteNode6(Ipv6Addr),
    /// Delete a stand-in.
    DeleteOuter6(Ipv4Addr),
}

/// The steps from `have` to `want`, in the order described above; empty when they are equal.
pub fn diff(have: &State, want: &State) -> Vec<Step> {
    let mut steps = Vec::new();
    steps.extend(want.barriers.difference(&have.barriers).map(|k| Step::PutBarrier(*k)));
    steps.extend(changed(&have.outer6, &want.outer6).map(|(k, v)| Step::PutOuter6(*k, *v)));
    steps.extend(changed(&have.nodes6, &want.nodes6).map(|(k, v)| Step::PutNode6(*k, *v)));
    steps.extend(changed(&have.nodes, &want.nodes).map(|(k, v)| Step::PutNode(*k, *v)));
    steps.extend(changed(&have.local, &want.local).map(|(k, v)| Step::PutLocal(*k, *v)));
    steps.extend(want.peers.iter().filter_map(|(key, peer)| put_peer(*key, have.peers.get(key), peer)));
    steps.extend(changed(&have.remote, &want.remote).map(|(k, v)| Step::PutRemote(*k, *v)));
    steps.extend(changed(&have.routes, &want.routes).map(|(k, v)| Step::PutRoute(*k, *v)));
    steps.extend(surplus(&have.routes, &want.routes).map(|k| Step::DeleteRoute(*k)));
    steps.extend(have.barriers.difference(&want.barriers).map(|k| Step::DeleteBarrier(*k)));
    steps.extend(surplus(&have.remote, &want.remote).map(|k| Step::DeleteRemote(*k)));
    steps.extend(surplus_prefixes(&have.peers, &want.peers));
    steps.extend(surplus(&have.peers, &want.peers).map(|k| Step::DeletePeer(*k)));
    steps.extend(surplus(&have.local, &want.local).map(|k| Step::DeleteLocal(*k)));
    steps.extend(surplus(&have.nodes, &want.nodes).map(|k| Step::DeleteNode(*k)));
    steps.extend(surplus(&have.nodes6, &want.nodes6).map(|k| Step::DeleteNode6(*k)));
    steps.extend(surplus(&have.outer6, &want.outer6).map(|k| Step::DeleteOuter6(*k)));
    steps
}

fn changed<'a, K: Ord, V: PartialEq>(
    have: &'a BTreeMap<K, V>,
    want: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    want.iter().filter(|(k, v)| have.get(k) != Some(v))
}

fn surplus<'a, K: Ord, V>(have: &'a BTreeMap<K, V>, want: &'a BTreeMap<K, V>) -> impl Iterator<Item = &'a K> {
    have.keys().filter(|k| !want.contains_key(k))
}

fn surplus_prefixes(have: &BTreeMap<PublicKey, Peer>, want: &BTreeMap<PublicKey, Peer>) -> impl Iterator<Item = Step> {
    let kept: BTreeSet<IpNet> = want.values().flat_map(|peer| &peer.allowed).copied().collect();
    have.iter().filter(|(key, _)| want.contains_key(key)).filter_map(move |(key, peer)| {
        let surplus: BTreeSet<IpNet> = peer.allowed.difference(&kept).copied().collect();
        (!surplus.is_empty()).then_some(Step::TakePrefixes(*key, surplus))
    })
}

/// While a session lives, the endpoint that WireGuard learned is newer than the configured one. A silent peer is reset
/// to its configured endpoint.
fn put_peer(key: PublicKey, have: Option<&Peer>, want: &Peer) -> Option<Step> {
    let preshared = match want.preshared {
        Preshared::Keep => have.map_or(Preshared::None, |have| have.preshared),
        known => known,
    };
    let Some(have) = have else { return Some(Step::PutPeer(key, Peer { preshared, ..want.clone() })) };
    let endpoint = if have.alive { have.endpoint.or(want.endpoint) } else { want.endpoint.or(have.endpoint) };
    let want = Peer { endpoint, preshared, ..want.clone() };
    let same = Peer { alive: have.alive, ..want.clone() } == *have;
    (!same).then_some(Step::PutPeer(key, want))
}

#[cfg(test)]
mod tests;
