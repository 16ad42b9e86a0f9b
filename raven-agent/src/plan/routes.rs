//! Routes of our table: exactly the remote prefixes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::{Role, path::Path};
use crate::diff::{Device, Route};

/// The address of a node inside one of its prefixes: the first one, as flannel does. Pods never have it.
pub(super) fn own_address(prefix: &IpNet) -> IpNet {
    IpNet::from(prefix.network())
}

/// The source of host processes' packets: an address that the node has in its prefix (its CNI's bridge, say), else ours.
///
/// Ours is the first of the prefix. Beside a bridge with the same prefix Linux before 5.14 takes that for a broadcast address
/// and refuses it as a source, and every Linux takes the first of an IPv6 prefix for an anycast address, which takes no TCP
/// connections.
pub(super) fn source(prefix: &IpNet, addresses: &BTreeSet<IpAddr>) -> IpAddr {
    let own = own_address(prefix).addr();
    addresses.range(own..).take_while(|a| prefix.contains(*a)).find(|a| **a != own).copied().unwrap_or(own)
}

/// A route per remote prefix. A pool that cannot be reached has its routes too: its packets must end here, counted,
/// and not leave in clear by the default route.
pub(super) fn routes(paths: &BTreeMap<&str, Path>, role: Role, sources: &[IpAddr], mtu: u32) -> BTreeMap<IpNet, Route> {
    let device = if role == Role::Gateway { Device::Tunnel } else { Device::Overlay };
    let source = |prefix: &IpNet| -> Option<IpAddr> { sources.iter().copied().find(|s| s.is_ipv4() == prefix.addr().is_ipv4()) };
    paths
        .values()
        .flat_map(|path| path.prefixes.values().flatten())
        .map(|prefix| (*prefix, Route { device, source: source(prefix), mtu }))
        .collect()
}
