//! How each other pool is reached, and which gateway node stands for which node's prefixes.
//!
//! WireGuard gives each prefix to one peer, for sending *and* for what it accepts. So with several active gateway nodes in
//! a pool, each node of the pool belongs to one of them (its *owner*), and both directions of its traffic pass there.
//! The choice is a rendezvous hash: everybody computes the same one from the topology alone, and a gateway node that
//! leaves moves only its own share.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use crate::topology::{Pool, PublicKey, Topology};

/// The way to one other pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Path<'a> {
    /// Its id in maps and counters.
    pub(super) id: u32,
    /// The pool.
    pub(super) pool: &'a Pool,
    /// Its prefixes, less those that must never enter the tunnel; by member.
    pub(super) prefixes: BTreeMap<&'a str, BTreeSet<IpNet>>,
    /// Who carries it.
    pub(super) way: Way,
}

/// Who carries the packets of a pair of pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// The other pool's own gateway nodes: one of the two can be dialled.
    Direct,
    /// A gateway node of an exposed pool, by its key.
    Relay(PublicKey),
    /// Nobody: neither can be dialled, and no exposed pool is there.
    None,
}

/// The ways to all other pools, by their names.
pub(super) fn paths<'a>(
    topology: &'a Topology,
    own_name: &str,
    own: &Pool,
    guard: &BTreeSet<IpNet>,
    problems: &mut Vec<String>,
) -> BTreeMap<&'a str, Path<'a>> {
    let ids = gateway_ids(topology);
    let others = topology.pools.iter().filter(|(name, _)| *name != own_name);
    others
        .map(|(name, pool)| {
            let prefixes = allowed(name, pool, guard, problems);
            let way = way(topology, (own_name, own), (name, pool));
            if way == Way::None && !pool.members.is_empty() {
                problems.push(format!(
                    "Gateway {name} cannot be reached from Gateway {own_name}: neither can be dialled, and no exposed Gateway \
                     (spec.exposeType) with a gateway node is there to relay"
                ));
            }
            (name.as_str(), Path { id: ids[name.as_str()], pool, prefixes, way })
        })
        .collect()
}

fn allowed<'a>(name: &str, pool: &'a Pool, guard: &BTreeSet<IpNet>, problems: &mut Vec<String>) -> BTreeMap<&'a str, BTreeSet<IpNet>> {
    let mut keep = |node: &str, prefix: &IpNet| match guard.iter().find(|g| g.contains(prefix) || prefix.contains(*g)) {
        Some(protected) => {
            problems.push(format!(
                "Gateway {name}: prefix {prefix} of node {node} is not sent into the tunnel: it would take {protected} along, \
                 which this node needs outside of it"
            ));
            false
        }
        None => true,
    };
    pool.members.iter().map(|(node, member)| (node.as_str(), member.prefixes.iter().filter(|p| keep(node, p)).copied().collect())).collect()
}

fn way(topology: &Topology, own: (&str, &Pool), other: (&str, &Pool)) -> Way {
    if own.1.dialable() || other.1.dialable() {
        return Way::Direct;
    }
    // Both ends must choose the same relay: the pair is hashed without regard to its direction.
    let (a, b) = if own.0 < other.0 { (own.0, other.0) } else { (other.0, own.0) };
    let relays = topology.pools.values().filter(|p| p.exposed).flat_map(|p| p.usable()).filter(|(_, _, peer)| peer.dial.is_some());
    relays.max_by_key(|(node, _, _)| weight(&[a, b, node])).map_or(Way::None, |(_, key, _)| Way::Relay(key))
}

/// The gateway node that stands for `member`: itself if it is one, else by rendezvous hash among those with a key.
pub(super) fn owner<'a>(pool: &'a Pool, member: &str) -> Option<&'a str> {
    if let Some((name, _)) = pool.gateways.get_key_value(member) {
        return Some(name);
    }
    pool.usable().map(|(name, _, _)| name).max_by_key(|name| weight(&[member, name]))
}

/// FNV-1a over the parts, with a separator that no Kubernetes name contains; the finalizer of SplitMix64 spreads it.
pub(crate) fn weight(parts: &[&str]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in parts.iter().flat_map(|p| p.bytes().chain([b'/'])) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

/// Ids of all Gateways: a hash of the name, so that counters keep their meaning when Gateways come and go. Two names
/// with one hash are told apart in the order of the names; 0 means none.
pub fn gateway_ids(topology: &Topology) -> BTreeMap<String, u32> {
    let mut taken = BTreeSet::from([raven_common::tables::NO_GATEWAY]);
    let mut ids = BTreeMap::new();
    for name in topology.pools.keys() {
        let mut id = weight(&[name]) as u32;
        while !taken.insert(id) {
            id = id.wrapping_add(1);
        }
        ids.insert(name.clone(), id);
    }
    ids
}
