//! Routes of Raven's table: exactly the remote prefixes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use ipnet::IpNet;

use super::path::Path;
use crate::state::{Device, Route};

/// A node's own address inside one of its prefixes: the first one, as flannel chooses it. No pod gets it.
pub(super) fn own_address(prefix: &IpNet) -> IpNet {
    IpNet::from(prefix.network())
}

/// The source address of packets from host processes: an address that the node has inside its prefix (on its CNI's
/// bridge, for example), else [`own_address`].
///
/// An existing address is preferred because the first one of a prefix has limits: beside a bridge with the same prefix,
/// Linux before 5.14 takes it for a broadcast address and refuses it as a source; every Linux takes the first address
/// of an IPv6 prefix for an anycast address, which accepts no TCP connections.
pub(super) fn source(prefix: &IpNet, addresses: &BTreeSet<IpAddr>) -> IpAddr {
    let own = own_address(prefix).addr();
    addresses.range(own..).take_while(|a| prefix.contains(*a)).find(|a| **a != own).copied().unwrap_or(own)
}

/// One route per remote prefix. A pool that cannot be reached has its routes too: its packets must reach Raven's
/// device, where the program or WireGuard drops them, and must not leave unencrypted by the default route.
pub(super) fn routes(
    paths: &BTreeMap<&str, Path>,
    device: Device,
    sources: &[IpAddr],
    mtu: u32,
) -> BTreeMap<IpNet, Route> {
    let source =
        |prefix: &IpNet| -> Option<IpAddr> { sources.iter().copied().find(|s| s.is_ipv4() == prefix.addr().is_ipv4()) };
    paths
        .values()
        .flat_map(|path| path.prefixes.values().flatten())
        .map(|prefix| (*prefix, Route { device, source: source(prefix), mtu }))
        .collect()
}
