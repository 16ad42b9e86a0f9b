//! The driver of devices, addresses, routes and rules, over rtnetlink. It reads the kernel's state and changes only the
//! difference; it deletes only objects with Raven's name, table or protocol number.

mod device;
mod filters;
mod interception;
mod route;
mod upstream;

use std::{collections::BTreeSet, net::IpAddr};

use futures::{Stream, StreamExt, TryStreamExt};
use ipnet::IpNet;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::AddressAttribute,
    link::{LinkAttribute, LinkMessage},
};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection, packet_core::NetlinkPayload};

use crate::names;

pub use self::{device::Found, route::Hop};

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
}

/// The device that faces the pool's LAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Device name.
    pub name: String,
    /// Interface index.
    pub index: u32,
    /// MTU in bytes.
    pub mtu: u32,
    /// The subnets of its addresses.
    pub subnets: BTreeSet<IpNet>,
    /// The addresses of all devices.
    pub node_addresses: BTreeSet<IpAddr>,
}

impl Links {
    /// Opens the netlink sockets. The stream yields whenever one of Raven's devices, a route of its tables or any rule
    /// changes, by Raven or by another program. Devices and routes of pods are ignored.
    pub fn connect() -> Result<(Self, impl Stream<Item = ()> + Unpin + Send), Error> {
        let groups = [
            MulticastGroup::Link,
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
        let ours = messages.filter_map(|(message, _)| std::future::ready(concerns_us(&message.payload).then_some(())));
        Ok((Self { handle }, ours))
    }

    /// The device that has `address`.
    pub async fn uplink(&self, address: IpAddr) -> Result<Uplink, Error> {
        let mut index = None;
        let mut addresses = Vec::new();
        let mut stream = self.handle.address().get().execute();
        while let Some(message) = stream.try_next().await.map_err(failed("list addresses"))? {
            let local = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Local(ip) => Some(*ip),
                _ => None,
            });
            let any = message.attributes.iter().find_map(|a| match a {
                AddressAttribute::Address(ip) => Some(*ip),
                _ => None,
            });
            let Some(ip) = local.or(any) else { continue };
            if ip == address {
                index = Some(message.header.index);
            }
            addresses.push((message.header.index, ip, message.header.prefix_len));
        }
        let index = index.ok_or(Error::NoUplink(address))?;
        let link = self.by_index(index).await?.ok_or(Error::NoUplink(address))?;
        let node_addresses = addresses.iter().map(|(_, ip, _)| *ip).collect();
        let subnets = addresses.into_iter().filter(|(i, _, _)| *i == index);
        Ok(Uplink {
            name: link.name,
            index,
            mtu: link.mtu,
            subnets: subnets.filter_map(|(_, ip, len)| Some(IpNet::new(ip, len).ok()?.trunc())).collect(),
            node_addresses,
        })
    }

    /// A device's name by its index.
    pub async fn name(&self, index: u32) -> Option<String> {
        self.by_index(index).await.ok().flatten().map(|found| found.name)
    }

    async fn by_index(&self, index: u32) -> Result<Option<device::Found>, Error> {
        let mut stream = self.handle.link().get().match_index(index).execute();
        let message = stream.try_next().await.map_err(failed(format!("read device {index}")))?;
        Ok(message.as_ref().map(device::Found::from))
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
            matches!(route::table_of(route), names::TABLE | names::INTERCEPTION_TABLE)
        }
        NetlinkPayload::InnerMessage(NewRule(_) | DelRule(_)) | NetlinkPayload::Overrun(_) => true,
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
