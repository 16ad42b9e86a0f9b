//! WireGuard peers of a gateway node.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    PeerName,
    path::{Path, Way, owner},
};
use crate::{
    diff::Peer,
    topology::{Pool, PresharedKey, PublicKey, Topology},
};

/// Seconds between keepalives towards a peer that we dial: below the 30 s after which the meanest NATs forget a UDP
/// mapping, well above a metered link's annoyance.
const KEEPALIVE: u16 = 15;

/// One peer per gateway node that we talk to directly; its allowed IPs are what it may send: its own share of its pool,
/// and the pools that it relays.
pub(super) fn peers(paths: &BTreeMap<&str, Path>, own: &Pool, preshared: Option<PresharedKey>) -> BTreeMap<PublicKey, Peer> {
    let mut peers = BTreeMap::new();
    // A gateway node behind NAT dials; one that can be dialled waits, so that it never aims at a stale address.
    let own_dialable = own.dialable();
    for path in paths.values().filter(|p| p.way == Way::Direct) {
        for (node, key, gateway) in path.pool.usable() {
            let allowed: BTreeSet<_> = path
                .prefixes
                .iter()
                .filter(|(member, _)| owner(path.pool, member) == Some(node))
                .flat_map(|(_, prefixes)| prefixes.iter().copied())
                .collect();
            let keepalive = (gateway.dial.is_some() && !own_dialable).then_some(KEEPALIVE);
            peers.insert(key, Peer { endpoint: gateway.dial, allowed, keepalive, preshared, alive: false });
        }
    }
    for path in paths.values() {
        if let Way::Relay(key) = path.way
            && let Some(relay) = peers.get_mut(&key)
        {
            relay.allowed.extend(path.prefixes.values().flatten().copied());
        }
    }
    peers
}

/// Who has which key.
pub(super) fn names(topology: &Topology) -> BTreeMap<PublicKey, PeerName> {
    let pools = topology.pools.iter();
    pools
        .flat_map(|(gateway, pool)| {
            pool.usable().map(move |(node, key, _)| (key, PeerName { node: node.to_owned(), gateway: gateway.clone() }))
        })
        .collect()
}
