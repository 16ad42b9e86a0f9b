//! Contents of the eBPF maps.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
};

use ipnet::IpNet;
use raven_common::tables::{Local, NODE_IS_GATEWAY, Node, Remote};

use super::{
    Detour, Role,
    path::{Path, gateway_ids, owner},
};
use crate::{
    proxy::{self, plan::DetourTo},
    topology::{Pool, Topology},
};

/// Remote prefixes. On an ordinary node they go by the gateway node that owns this node; without one `via` is zero
/// and the program drops, counted.
pub(super) fn remote(paths: &BTreeMap<&str, Path>, role: Role, me: &str, own: &Pool) -> BTreeMap<IpNet, Remote> {
    let via = match role {
        Role::Ordinary => owner(own, me).and_then(|gateway| own.members.get(gateway)).map_or([0; 4], |m| m.outer.octets()),
        Role::Gateway | Role::None => [0; 4],
    };
    let entry = |path: &Path, prefix: &IpNet| (*prefix, Remote { gateway: path.id, via });
    paths.values().flat_map(|path| path.prefixes.values().flatten().map(move |prefix| entry(path, prefix))).collect()
}

/// Addresses of edge nodes whose kubelets are reached by this pool's proxy: on an ordinary node the overlay brings them to the
/// gateway node, which has no entry for them and hands them to its own stack.
pub(super) fn detoured(topology: &Topology, detour: &proxy::plan::Detour, taken: &Detour) -> BTreeMap<IpNet, Remote> {
    let DetourTo::Gateway(via) = detour.to else { return BTreeMap::new() };
    let ids = gateway_ids(topology);
    let pool_of = |address: &Ipv4Addr| detour.nodes.get(address).and_then(|nodes| nodes.first()).and_then(|(_, pool)| ids.get(pool));
    let entries = taken.nodes.keys().filter_map(|address| Some((address, *pool_of(address)?)));
    entries.map(|(address, gateway)| (IpNet::from(IpAddr::V4(*address)), Remote { gateway, via: via.octets() })).collect()
}

/// Prefixes of this pool.
pub(super) fn local(own: &Pool) -> BTreeMap<IpNet, Local> {
    let members = own.members.values();
    members.flat_map(|m| m.prefixes.iter().map(|prefix| (*prefix, Local { node: m.outer.octets() }))).collect()
}

/// Nodes of this pool.
pub(super) fn nodes(own: &Pool) -> BTreeMap<Ipv4Addr, Node> {
    let flags = |name: &str| if own.gateways.contains_key(name) { NODE_IS_GATEWAY } else { 0 };
    own.members.iter().map(|(name, m)| (m.outer, Node { flags: flags(name) })).collect()
}
