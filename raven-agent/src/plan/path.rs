//! How each other pool is reached, and which gateway node owns the prefixes of each member.
//!
//! WireGuard assigns each prefix to one peer, for sending and for what it accepts. With several active gateway nodes in
//! a pool, each member therefore has one *owner* among them, and both directions of its traffic pass through that
//! owner. The owner is chosen by rendezvous hash ([`weight`]).

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;

use super::rendezvous::weight;
use crate::topology::{Member, Pool, PublicKey, Topology};

/// The path to one other pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Path<'a> {
    /// Gateway id in maps and counters.
    pub(super) id: u32,
    /// The other pool.
    pub(super) pool: &'a Pool,
    /// Its prefixes by member, without those that must never enter the tunnel.
    pub(super) prefixes: BTreeMap<&'a str, BTreeSet<IpNet>>,
    /// The peers that carry it.
    pub(super) kind: PathKind,
}

/// The peers that carry the packets between two pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PathKind {
    /// The gateway nodes of the other pool: at least one of the two pools can be dialled.
    Direct,
    /// A gateway node of a pool that relays, by its key.
    Relay(PublicKey),
    /// No peer: neither pool can be dialled, and no pool that relays has a gateway node.
    None,
}

/// The paths to all other pools, by Gateway name.
pub(super) fn paths<'a>(
    topology: &'a Topology,
    own_name: &str,
    own: &Pool,
    protected: &Protected<'_>,
    problems: &mut Vec<String>,
) -> BTreeMap<&'a str, Path<'a>> {
    let ids = gateway_ids(topology);
    let relays = topology.relays();
    let others = topology.pools.iter().filter(|(name, pool)| *name != own_name && pool.l3);
    others
        .map(|(name, pool)| {
            let prefixes = allowed(name, pool, protected, problems);
            let kind = path_kind(&relays, (own_name, own), (name, pool));
            if kind == PathKind::None && !pool.members.is_empty() {
                problems.push(format!(
                    "Gateway {name} cannot be reached from Gateway {own_name}: neither can be dialled, and no exposed Gateway \
                     (spec.exposeType) with a gateway node can relay"
                ));
            }
            (name.as_str(), Path { id: ids[name.as_str()], pool, prefixes, kind })
        })
        .collect()
}

/// What must stay outside the tunnel on this node.
pub(super) struct Protected<'a> {
    /// No prefix may overlap these.
    pub(super) prefixes: BTreeSet<IpNet>,
    /// The subnets of the uplink: no prefix may overlap these either, with one exception. A LAN whose mask is too wide
    /// (10.0.0.0/8) contains the pods of its own nodes, too. There, the narrower prefixes of other pools are used.
    pub(super) subnets: &'a BTreeSet<IpNet>,
    /// This node's own prefixes of pods.
    pub(super) own: &'a [IpNet],
}

impl Protected<'_> {
    fn conflict(&self, member: &Member, prefix: &IpNet) -> Option<&IpNet> {
        let is_address = prefix.prefix_len() == prefix.max_prefix_len() && member.addresses.contains(&prefix.addr());
        let overlapped = self.prefixes.iter().find(|p| p.contains(prefix) || prefix.contains(*p));
        let too_wide = |subnet: &IpNet| self.own.iter().any(|own| subnet.contains(own));
        let refuses =
            |subnet: &IpNet| prefix.contains(subnet) || (subnet.contains(prefix) && (is_address || !too_wide(subnet)));
        overlapped.or_else(|| self.subnets.iter().find(|subnet| refuses(subnet)))
    }
}

fn allowed<'a>(
    name: &str,
    pool: &'a Pool,
    protected: &Protected<'_>,
    problems: &mut Vec<String>,
) -> BTreeMap<&'a str, BTreeSet<IpNet>> {
    let mut keep = |node: &str, member: &Member, prefix: &IpNet| match protected.conflict(member, prefix) {
        Some(conflict) => {
            problems.push(format!(
                "Gateway {name}: prefix {prefix} of node {node} is not sent into the tunnel: it overlaps {conflict}, which this node \
                 reaches outside the tunnel"
            ));
            false
        }
        None => true,
    };
    let members = pool.members.iter();
    members
        .map(|(node, m)| (node.as_str(), m.prefixes.iter().filter(|p| keep(node, m, p)).copied().collect()))
        .collect()
}

fn path_kind(relays: &[(&str, &Pool)], own: (&str, &Pool), other: (&str, &Pool)) -> PathKind {
    if own.1.dialable() || other.1.dialable() {
        return PathKind::Direct;
    }
    // Both ends must choose the same relay, so the pair of names is hashed in a fixed order.
    let (a, b) = if own.0 < other.0 { (own.0, other.0) } else { (other.0, own.0) };
    let gateways = relays.iter().flat_map(|(_, pool)| pool.usable());
    let dialled = gateways.filter(|(_, _, peer)| peer.dial.is_some());
    dialled.max_by_key(|(node, _, _)| weight(&[a, b, node])).map_or(PathKind::None, |(_, key, _)| PathKind::Relay(key))
}

/// The gateway node that owns the prefixes of `member`: the member itself if it is a gateway node, else one with a key,
/// by rendezvous hash.
pub(super) fn owner<'a>(pool: &'a Pool, member: &str) -> Option<&'a str> {
    if let Some((name, _)) = pool.gateways.get_key_value(member) {
        return Some(name);
    }
    pool.usable().map(|(name, _, _)| name).max_by_key(|name| weight(&[member, name]))
}

/// The ids of all Gateways: a hash of the name, so that counters keep their meaning when Gateways are added and
/// deleted. Collisions are resolved in the order of the names; 0 stands for no Gateway.
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
