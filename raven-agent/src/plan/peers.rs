//! WireGuard peers of a gateway node.

use std::collections::{BTreeMap, BTreeSet};

use super::path::{Path, PathKind, owner};
use crate::{
    state::{Peer, PeerName, Preshared},
    topology::{Dial, Pool, PublicKey, Topology},
};

/// Persistent keepalive in seconds towards a peer that this node dials: shorter than the 30 s after which the strictest
/// NATs expire a UDP mapping, and long enough for a metered link.
const KEEPALIVE: u16 = 15;

/// One peer per gateway node of a directly reached pool. Its allowed IPs are the prefixes that it owns in its pool, and
/// the prefixes of the pools that it relays.
pub(super) fn peers(paths: &BTreeMap<&str, Path>, own: &Pool, preshared: Preshared) -> BTreeMap<PublicKey, Peer> {
    let mut peers = BTreeMap::new();
    for path in paths.values().filter(|p| p.kind == PathKind::Direct) {
        for (node, key, gateway) in path.pool.usable() {
            let allowed: BTreeSet<_> = path
                .prefixes
                .iter()
                .filter(|(member, _)| owner(path.pool, member) == Some(node))
                .flat_map(|(_, prefixes)| prefixes.iter().copied())
                .collect();
            // Only an exposed pool is surely not behind NAT: elsewhere, `underNAT` may have been left out, and `publicIP` may be
            // that of the NAT.
            let keepalive = (gateway.dial.is_some() && !own.exposed).then_some(KEEPALIVE);
            peers.insert(
                key,
                Peer {
                    endpoint: gateway.dial.as_ref().and_then(Dial::address),
                    allowed,
                    keepalive,
                    preshared,
                    alive: false,
                },
            );
        }
    }
    for path in paths.values() {
        if let PathKind::Relay(key) = path.kind
            && let Some(relay) = peers.get_mut(&key)
        {
            relay.allowed.extend(path.prefixes.values().flatten().copied());
        }
    }
    peers
}

/// Node and Gateway of every published key.
pub(super) fn names(topology: &Topology) -> BTreeMap<PublicKey, PeerName> {
    let pools = topology.pools.iter();
    pools
        .flat_map(|(gateway, pool)| {
            pool.usable().map(move |(node, key, _)| (key, PeerName { node: node.to_owned(), gateway: gateway.clone() }))
        })
        .collect()
}
