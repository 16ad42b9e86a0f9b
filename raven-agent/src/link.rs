//! The driver of devices, addresses, routes and rules, over rtnetlink. Reads what is there and changes only the difference;
//! deletes only what carries our name, table or protocol number.

mod detour;
mod device;
mod filters;
mod route;

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

pub use self::{
    detour::{Detour, Way},
    device::{Found, set_sysctls},
    route::Hop,
};

/// What rtnetlink refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket.
    #[error("open a netlink socket: {0}")]
    Connect(#[from] std::io::Error),
    /// A request failed.
    #[error("{action}: {source}{}", hint(.source))]
    Request {
        /// What was tried, with the object's name.
        action: String,
        /// Why not.
        source: rtnetlink::Error,
    },
    /// No device has the address that the node's object names.
    #[error(
        "no device of this node has the address {0}, which its Node object gives as InternalIP; is --node-name right, and does the address belong to this machine?"
    )]
    NoUplink(IpAddr),
}

impl Error {
    /// True if the kernel does not know the kind of device.
    pub fn is_unsupported(&self) -> bool {
        // EOPNOTSUPP
        matches!(self, Self::Request { source: rtnetlink::Error::NetlinkError(e), .. } if e.raw_code() == -95)
    }
}

/// A word on the usual causes.
fn hint(source: &rtnetlink::Error) -> &'static str {
    match source {
        // EPERM
        rtnetlink::Error::NetlinkError(e) if e.raw_code() == -1 => " (the agent needs CAP_NET_ADMIN)",
        // EADDRINUSE: of our devices only the overlay has a port of the kernel's.
        rtnetlink::Error::NetlinkError(e) if e.raw_code() == -98 => {
            " (another device or program has UDP port 4472, the overlay's; `ss -lunp` and `ip -d link show type vxlan` say which)"
        }
        _ => "",
    }
}

fn failed(action: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> Error {
    let action = action.into();
    move |source| Error::Request { action, source }
}

/// The driver.
#[derive(Clone)]
pub struct Links {
    handle: Handle,
}

/// The device that faces the pool's LAN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// Name.
    pub name: String,
    /// Index.
    pub index: u32,
    /// Bytes.
    pub mtu: u32,
    /// The subnets of its addresses.
    pub subnets: BTreeSet<IpNet>,
    /// The addresses of all devices.
    pub node_addresses: BTreeSet<IpAddr>,
}

impl Links {
    /// Connects. The stream yields whenever one of our devices, a route of our table or any rule changed: somebody else's
    /// doing, or ours. What pods come and go with is nothing to us.
    pub fn connect() -> Result<(Self, impl Stream<Item = ()> + Unpin + Send), Error> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
            MulticastGroup::Ipv4Rule,
            MulticastGroup::Ipv6Rule,
        ];
        // By a socket of their own: where they are too many for it, the kernel drops what comes next, and that must be no answer to us.
        let (notified, _, messages) = new_multicast_connection(&groups)?;
        let (connection, handle, _) = new_connection()?;
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

/// True if a notification is about something that we made, or may have been: some were lost.
fn concerns_us(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    use RouteNetlinkMessage::{DelLink, DelRoute, DelRule, NewLink, NewRoute, NewRule};
    match payload {
        NetlinkPayload::InnerMessage(NewLink(link) | DelLink(link)) => {
            attribute(
                link,
                |a| if let LinkAttribute::IfName(name) = a { Some(name == names::OVERLAY || name == names::TUNNEL) } else { None },
            )
            .unwrap_or(false)
        }
        NetlinkPayload::InnerMessage(NewRoute(route) | DelRoute(route)) => {
            matches!(route::table_of(route), names::TABLE | names::DETOUR_TABLE)
        }
        NetlinkPayload::InnerMessage(NewRule(_) | DelRule(_)) | NetlinkPayload::Overrun(_) => true,
        _ => false,
    }
}

/// Attribute of a link, by what it is.
fn attribute<T>(message: &LinkMessage, wanted: impl Fn(&LinkAttribute) -> Option<T>) -> Option<T> {
    message.attributes.iter().find_map(wanted)
}

/// False on a node that was booted with `ipv6.disable=1`: it has no routes, rules and addresses of that family.
pub fn has_ipv6() -> bool {
    std::path::Path::new("/proc/sys/net/ipv6").exists()
}

fn family(address: &IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
