//! The WireGuard peers of this node.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
};

use super::me::Me;
use super::path::{Path, PathKind, owner};
use crate::{
    state::{Peer, PeerName, Preshared},
    topology::{Dial, Member, Pool, PublicKey, Topology},
};

/// Persistent keepalive in seconds towards a peer that this node dials: shorter than the 30 s after which the strictest
/// NATs expire a UDP mapping, and long enough for a metered link.
const KEEPALIVE: u16 = 15;

/// In a pool with encryption: the peers inside the pool. On a gateway node, the members that it owns, which it dials; on
/// a member, the gateway node that owns it. Both ends can be dialled, because they are on one LAN.
pub(super) fn inside(paths: &BTreeMap<&str, Path>, own: &Pool, me: &Me) -> BTreeMap<PublicKey, Peer> {
    let peer = |member: &Member, allowed, keepalive| Peer {
        endpoint: Some(SocketAddr::new(member.address, member.tunnel_port)),
        allowed,
        keepalive,
        preshared: me.preshared,
        alive: false,
    };
    if own.gateways.contains_key(&me.node) {
        let owned = own.members.iter().filter(|(name, _)| **name != me.node && owner(own, name) == Some(&me.node));
        // With a keepalive, a restarted gateway node starts the sessions again that its members still have.
        let peers =
            owned.filter_map(|(_, member)| Some((member.key?, peer(member, member.prefixes.clone(), Some(KEEPALIVE)))));
        return peers.collect();
    }
    let gateway = owner(own, &me.node).and_then(|name| Some((own.members.get(name)?, own.gateways.get(name)?)));
    let all = || paths.values().flat_map(|path| path.prefixes.values().flatten().copied()).collect();
    gateway.and_then(|(member, gateway)| Some((gateway.key?, peer(member, all(), None)))).into_iter().collect()
}

/// Nodes of a pool with encryption that have not published a key.
pub(super) fn without_key<'a>(own: &'a Pool, me: &'a str) -> impl Iterator<Item = &'a str> {
    let owned =
        own.members.iter().filter(move |(name, _)| !own.gateways.contains_key(*name) && owner(own, name) == Some(me));
    owned.filter(|(_, member)| member.key.is_none()).map(|(name, _)| name.as_str())
}

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
            let elected = pool.usable().map(|(node, key, _)| (node, key));
            let members = pool.members.iter().filter_map(|(node, member)| Some((node.as_str(), member.key?)));
            members
                .chain(elected)
                .map(move |(node, key)| (key, PeerName { node: node.to_owned(), gateway: gateway.clone() }))
        })
        .collect()
}
