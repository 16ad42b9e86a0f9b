//! Contents of the eBPF maps that describe pools.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use raven_common::tables::{Local, NODE_IS_GATEWAY, Node, Remote};

use super::path::{Path, owner};
use crate::{state::Device, topology::Pool};

/// Remote prefixes, whose routes lead to `device`. If that is the overlay, `via` is the gateway node that owns this member;
/// without one it is zero, and the program drops and counts the packet.
pub(super) fn remote(paths: &BTreeMap<&str, Path>, device: Device, me: &str, own: &Pool) -> BTreeMap<IpNet, Remote> {
    let via = match device {
        Device::Overlay => {
            owner(own, me).and_then(|gateway| own.members.get(gateway)).map_or([0; 4], |m| m.outer.octets())
        }
        Device::Tunnel => [0; 4],
    };
    let entry = |path: &Path, prefix: &IpNet| (*prefix, Remote { gateway: path.id, via });
    paths.values().flat_map(|path| path.prefixes.values().flatten().map(move |prefix| entry(path, prefix))).collect()
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

/// Outer address by IPv6 address of this pool's nodes. If two nodes list the same address, it is that of the node whose
/// address inside the pool it is.
pub(super) fn nodes6(own: &Pool) -> BTreeMap<Ipv6Addr, Ipv4Addr> {
    let members = || own.members.values();
    let all = members().flat_map(|m| m.addresses.iter().map(|address| (*address, m.outer)));
    let first = members().map(|m| (m.address, m.outer));
    all.chain(first).filter_map(|(address, outer)| Some((ipv6(address)?, outer))).collect()
}

/// The addresses behind stand-ins.
pub(super) fn outer6(own: &Pool) -> BTreeMap<Ipv4Addr, Ipv6Addr> {
    own.members.values().filter_map(|m| Some((m.outer, ipv6(m.address)?))).collect()
}

fn ipv6(address: IpAddr) -> Option<Ipv6Addr> {
    if let IpAddr::V6(address) = address { Some(address) } else { None }
}
