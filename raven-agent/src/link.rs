//! The driver of devices, addresses, routes and rules, over rtnetlink. It reads the kernel's state and changes only the
//! difference; it deletes only objects with Raven's name, table or protocol number.

mod device;
mod filters;
mod interception;
mod neighbours;
mod route;
mod uplink;
mod upstream;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use futures::{Stream, StreamExt};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressAttribute,
    link::{LinkAttribute, LinkMessage},
};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection, packet_core::NetlinkPayload};

use crate::names;

pub use self::{
    device::Found,
    neighbours::{Losses, Neighbours},
    route::Hop,
    uplink::{NetDevice, Uplink, Uplinks},
};

/// A netlink request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A netlink socket could not be opened.
    #[error("cannot open a netlink socket: {0}")]
    Connect(std::io::Error),
    /// The kernel refused a request.
    #[error("cannot {action}: {reason}{}", hint(.reason))]
    Request {
        /// The attempted action and its object.
        action: String,
        /// The kernel's answer.
        reason: rtnetlink::Error,
    },
    /// No device has the InternalIP of the Node object.
    #[error(
        "no device of this node has the address {0}, the InternalIP of its Node object; check --node-name, or set --node-ip to an address of this machine"
    )]
    NoUplink(IpAddr),
    /// The node's address is on a device without other hosts, and no route leads to the nodes of its pool.
    #[error(
        "the address {address} is on {device}, which has no other hosts, and no route leads to the other nodes of this node's pool: check `ip route`"
    )]
    NoRoute {
        /// The node's address.
        address: IpAddr,
        /// Name of the device.
        device: String,
    },
    /// IPv6 is off on one of Raven's devices, and could not be switched on.
    #[error(
        "IPv6 is disabled on new devices of this node, and {path} cannot be written ({reason}): IPv6 packets of other pools are \
         dropped; sysctl -w net.ipv6.conf.default.disable_ipv6=0, then delete the device (Raven creates it again)"
    )]
    Ipv6Disabled {
        /// File of the setting.
        path: String,
        /// The error of the write.
        reason: std::io::Error,
    },
}

impl Error {
    /// True if the kernel does not support this kind of device.
    pub fn is_unsupported(&self) -> bool {
        // EOPNOTSUPP
        matches!(self, Self::Request { reason: rtnetlink::Error::NetlinkError(e), .. } if e.raw_code() == -95)
    }
}

/// The remedy for the usual causes.
fn hint(reason: &rtnetlink::Error) -> &'static str {
    match reason {
        // EPERM
        rtnetlink::Error::NetlinkError(e) if e.raw_code() == -1 => " (the agent needs CAP_NET_ADMIN)",
        // EADDRINUSE: of Raven's devices, only the overlay has a port in the kernel.
        rtnetlink::Error::NetlinkError(e) if e.raw_code() == -98 => {
            " (another device or program uses UDP port 4472, the overlay's; find it with `ss -lunp` and `ip -d link show type vxlan`)"
        }
        _ => "",
    }
}

fn failed(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let action = action.into();
    move |reason| Error::Request { action, reason }
}

/// The netlink driver.
#[derive(Clone)]
pub struct Links {
    handle: Handle,
    watched: Watched,
}

type Watched = Arc<Mutex<Watch>>;

/// What is known of the uplink.
#[derive(Clone, Copy, Debug, Default)]
struct Watch {
    address: Option<IpAddr>,
    /// None: any device may become the uplink.
    index: Option<u32>,
    /// One of them has changed since the routes were looked up.
    changed: bool,
}

impl Links {
    /// Opens the netlink sockets. The stream yields whenever one of Raven's devices, the uplink or its address, a route of
    /// Raven's tables or any rule changes, by Raven or by another program. Devices and routes of pods are ignored.
    pub fn connect() -> Result<(Self, impl Stream<Item = ()> + Unpin + Send), Error> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        // Notifications have their own socket: when it overflows, the kernel drops messages, which must not be
        // answers to requests.
        let (notified, _, messages) = new_multicast_connection(&groups).map_err(Error::Connect)?;
        let (connection, handle, _) = new_connection().map_err(Error::Connect)?;
        tokio::spawn(notified);
        tokio::spawn(connection);
        let watched = Watched::default();
        let links = Self { handle, watched: watched.clone() };
        let ours = messages.filter_map(move |(message, _)| {
            let mut watch = watched.lock().unwrap_or_else(PoisonError::into_inner);
            let is_uplink = concerns_uplink(&message.payload, *watch);
            watch.changed |= is_uplink;
            std::future::ready((is_uplink || concerns_us(&message.payload)).then_some(()))
        });
        Ok((links, ours))
    }

    /// Makes the stream of [`Links::connect`] yield when the uplink or its address changes. Returns true if that has
    /// happened since the last call.
    fn watch_uplink(&self, address: IpAddr, index: Option<u32>) -> bool {
        let mut watch = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *watch, Watch { address: Some(address), index, changed: false }).changed
    }

    /// A device's name by its index.
    pub async fn name(&self, index: u32) -> Option<String> {
        self.by_index(index).await.ok().flatten().map(|found| found.name)
    }

    async fn by_index(&self, index: u32) -> Result<Option<device::Found>, Error> {
        device::read(self.handle.link().get().match_index(index), format!("read device {index}")).await
    }
}

/// True if a notification is about one of Raven's objects, or if notifications were lost.
fn concerns_us(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    use RouteNetlinkMessage::{DelLink, DelRoute, DelRule, NewLink, NewRoute, NewRule};
    match payload {
        NetlinkPayload::InnerMessage(NewLink(link) | DelLink(link)) => attribute(link, |a| {
            if let LinkAttribute::IfName(name) = a {
                Some(name == names::OVERLAY || name == names::TUNNEL)
            } else {
                None
            }
        })
        .unwrap_or(false),
        NetlinkPayload::InnerMessage(NewRoute(route) | DelRoute(route)) => {
            matches!(route::table_of(route), names::TABLE | names::INTERCEPTION_TABLE | names::PROXIES_TABLE)
        }
        NetlinkPayload::InnerMessage(NewRule(_) | DelRule(_)) | NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// True if a notification is about the uplink or its address, or if notifications were lost.
fn concerns_uplink(payload: &NetlinkPayload<RouteNetlinkMessage>, watch: Watch) -> bool {
    use RouteNetlinkMessage::{DelAddress, DelLink, NewAddress, NewLink};
    // Before the first run, nothing is known, and nothing has to be noticed.
    let is_uplink = |found: u32| watch.address.is_some() && watch.index.is_none_or(|index| index == found);
    match payload {
        NetlinkPayload::InnerMessage(NewLink(link) | DelLink(link)) => is_uplink(link.header.index),
        NetlinkPayload::InnerMessage(NewAddress(message) | DelAddress(message)) => {
            let is_ours = |a: &AddressAttribute| matches!(a, AddressAttribute::Local(ip) | AddressAttribute::Address(ip) if Some(*ip) == watch.address);
            is_uplink(message.header.index) || message.attributes.iter().any(is_ours)
        }
        NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// The first attribute of a link that `wanted` accepts.
fn attribute<T>(message: &LinkMessage, wanted: impl Fn(&LinkAttribute) -> Option<T>) -> Option<T> {
    message.attributes.iter().find_map(wanted)
}

/// False on a node booted with `ipv6.disable=1`, which has no IPv6 routes, rules or addresses.
pub fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

fn family(address: &IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
