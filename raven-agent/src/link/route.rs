//! Routes of Raven's table, and the rule that leads to it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Error, Links, failed};
use crate::{
    names,
    state::{Change, Device, Indexes, Route},
};

impl Links {
    /// The routes of Raven's table, and its unreachable routes. A route that Raven did not add, or whose device is
    /// missing, is returned with a value that is in no plan, so that it is replaced or deleted.
    pub async fn routes(&self, indexes: Indexes) -> Result<(BTreeMap<IpNet, Route>, BTreeSet<IpNet>), Error> {
        let (mut routes, mut barriers) = (BTreeMap::new(), BTreeSet::new());
        self.each_route(&[names::TABLE], |_, prefix, message| {
            if is_barrier(&message) {
                barriers.insert(prefix);
            } else {
                routes.insert(prefix, as_route(&message, indexes));
            }
        })
        .await?;
        Ok((routes, barriers))
    }

    /// Calls `each` for the routes of these tables that have a destination, in both families.
    pub(super) async fn each_route(
        &self,
        tables: &[u32],
        mut each: impl FnMut(u32, IpNet, RouteMessage),
    ) -> Result<(), Error> {
        for message in [RouteMessageBuilder::<Ipv4Addr>::new().build(), RouteMessageBuilder::<Ipv6Addr>::new().build()]
        {
            let mut stream = self.handle.route().get(message).execute();
            while let Some(message) = stream.try_next().await.map_err(failed("list routes"))? {
                let table = table_of(&message);
                if tables.contains(&table)
                    && let Some(prefix) = destination(&message)
                {
                    each(table, prefix, message);
                }
            }
        }
        Ok(())
    }

    /// Destinations of the routes in table `main` that leave by this device.
    pub async fn main_routes(&self, device: u32) -> Result<Vec<IpNet>, Error> {
        /// RT_TABLE_MAIN of linux/rtnetlink.h.
        const MAIN: u32 = 254;
        let by = RouteAttribute::Oif(device);
        let mut found = Vec::new();
        self.each_route(&[MAIN], |_, prefix, message| found.extend(message.attributes.contains(&by).then_some(prefix)))
            .await?;
        Ok(found)
    }

    /// Adds an unreachable route, behind the route to a device.
    pub async fn put_barrier(&self, prefix: IpNet) -> Result<(), Error> {
        let action = format!("add unreachable route {prefix} to table {}", names::TABLE);
        self.handle.route().add(barrier(prefix)).replace().execute().await.map_err(failed(action))
    }

    /// Deletes an unreachable route.
    pub async fn delete_barrier(&self, prefix: IpNet) -> Result<(), Error> {
        self.delete(barrier(prefix), format!("delete unreachable route {prefix} from table {}", names::TABLE)).await
    }

    /// Deletes all unreachable routes of Raven's table.
    pub async fn delete_barriers(&self) -> Result<Change, Error> {
        let mut change = Change::NONE;
        for prefix in self.barriers().await? {
            self.delete_barrier(prefix).await?;
            change += Change::ONE;
        }
        Ok(change)
    }

    /// The unreachable routes of Raven's table.
    pub async fn barriers(&self) -> Result<BTreeSet<IpNet>, Error> {
        self.routes(Indexes::NONE).await.map(|(_, barriers)| barriers)
    }

    /// Adds or replaces a route.
    pub async fn put_route(&self, prefix: IpNet, route: &Route, indexes: Indexes) -> Result<(), Error> {
        let (device, index) = match route.device {
            Device::Overlay => (names::OVERLAY, indexes.overlay),
            Device::Tunnel => (names::TUNNEL, indexes.tunnel.unwrap_or(0)),
        };
        let message = to_message(prefix, route, index);
        let action = format!("add route {prefix} dev {device} to table {}", names::TABLE);
        self.handle.route().add(message).replace().execute().await.map_err(failed(action))
    }

    /// The kernel's route lookup for a packet that this node sends to `address`; `None` if no route matches.
    pub async fn lookup(&self, address: IpAddr) -> Result<Option<Hop>, Error> {
        let message = match address {
            IpAddr::V4(ip) => RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(ip, 32).build(),
            IpAddr::V6(ip) => RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(ip, 128).build(),
        };
        let mut stream = self.handle.route().get(message).execute();
        let found = match stream.try_next().await {
            Ok(found) => found,
            // ENETUNREACH and similar codes are answers.
            Err(rtnetlink::Error::NetlinkError(_)) => None,
            Err(e) => return Err(failed(format!("look up the route to {address}"))(e)),
        };
        Ok(found.and_then(|message| {
            let index = message
                .attributes
                .iter()
                .find_map(|a| if let RouteAttribute::Oif(oif) = a { Some(*oif) } else { None })?;
            let table = Some(table_of(&message)).filter(|t| *t != 0);
            let source = message.attributes.iter().find_map(|a| match a {
                RouteAttribute::PrefSource(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
                RouteAttribute::PrefSource(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
                _ => None,
            });
            Some(Hop { index, table, source })
        }))
    }

    /// Deletes a route.
    pub async fn delete_route(&self, prefix: IpNet) -> Result<(), Error> {
        let mut message = in_table(prefix);
        // Matches any scope, protocol and type.
        message.header.scope = RouteScope::NoWhere;
        message.header.protocol = RouteProtocol::Unspec;
        message.header.kind = RouteType::Unspec;
        self.delete(message, format!("delete route {prefix} from table {}", names::TABLE)).await
    }

    async fn delete(&self, message: RouteMessage, action: String) -> Result<(), Error> {
        match self.handle.route().del(message).execute().await {
            // ESRCH: the kernel deleted it with its device, or another program did.
            Err(rtnetlink::Error::NetlinkError(e)) if e.raw_code() == -3 => Ok(()),
            result => result.map_err(failed(action)),
        }
    }

    /// Ensures that Raven's rule exists in both families.
    pub async fn ensure_rules(&self) -> Result<Change, Error> {
        let mut change = Change::NONE;
        for version in versions() {
            if !self.rules(version.clone()).await?.is_empty() {
                continue;
            }
            let mut request = self
                .handle
                .rule()
                .add()
                .table_id(names::TABLE)
                .priority(names::RULE_PRIORITY)
                .action(RuleAction::ToTable);
            request.message_mut().attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)));
            let action = format!("add rule {} for table {}", names::RULE_PRIORITY, names::TABLE);
            match version {
                IpVersion::V4 => request.v4().execute().await,
                IpVersion::V6 => request.v6().execute().await,
            }
            .map_err(failed(action))?;
            change += Change::ONE;
        }
        Ok(change)
    }

    /// Deletes Raven's rules.
    pub async fn delete_rules(&self) -> Result<Change, Error> {
        let mut change = Change::NONE;
        for version in versions() {
            for rule in self.rules(version).await? {
                self.handle
                    .rule()
                    .del(rule)
                    .execute()
                    .await
                    .map_err(failed(format!("delete rule {}", names::RULE_PRIORITY)))?;
                change += Change::ONE;
            }
        }
        Ok(change)
    }

    async fn rules(&self, version: IpVersion) -> Result<Vec<RuleMessage>, Error> {
        let mut found = Vec::new();
        let mut stream = self.handle.rule().get(version).execute();
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            if is_ours(&rule) {
                found.push(rule);
            }
        }
        Ok(found)
    }
}

/// The address families of this kernel.
pub(super) fn versions() -> impl Iterator<Item = IpVersion> {
    [IpVersion::V4].into_iter().chain(super::has_ipv6().then_some(IpVersion::V6))
}

/// True for a rule that is Raven's in every part. OpenYurt's Raven has a rule with the same priority and table that matches
/// only marked packets; taking it for Raven's would leave all other packets to the default route.
fn is_ours(rule: &RuleMessage) -> bool {
    let selects = rule.header.src_len > 0
        || rule.header.dst_len > 0
        || rule.attributes.iter().any(|attribute| {
            matches!(
                attribute,
                RuleAttribute::FwMark(1..)
                    | RuleAttribute::Iifname(_)
                    | RuleAttribute::Oifname(_)
                    | RuleAttribute::IpProtocol(_)
                    | RuleAttribute::SourcePortRange(_)
                    | RuleAttribute::DestinationPortRange(_)
                    | RuleAttribute::UidRange(_)
            )
        });
    let is = |attribute| rule.attributes.contains(&attribute);
    !selects
        && rule.header.action == RuleAction::ToTable
        && is(RuleAttribute::Table(names::TABLE))
        && is(RuleAttribute::Priority(names::RULE_PRIORITY))
        && is(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)))
}

fn is_barrier(message: &RouteMessage) -> bool {
    message.header.kind == RouteType::Unreachable
        && message.attributes.contains(&RouteAttribute::Priority(names::BARRIER_METRIC))
}

fn barrier(prefix: IpNet) -> RouteMessage {
    let mut message = in_table(prefix);
    message.header.protocol = RouteProtocol::Other(names::ROUTE_PROTOCOL);
    message.header.kind = RouteType::Unreachable;
    message.attributes.push(RouteAttribute::Priority(names::BARRIER_METRIC));
    message
}

/// A message about the route to `prefix` in Raven's table.
fn in_table(prefix: IpNet) -> RouteMessage {
    match prefix {
        IpNet::V4(p) => RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(p.addr(), p.prefix_len())
            .table_id(names::TABLE)
            .build(),
        IpNet::V6(p) => RouteMessageBuilder::<Ipv6Addr>::new()
            .destination_prefix(p.addr(), p.prefix_len())
            .table_id(names::TABLE)
            .build(),
    }
}

/// The result of a route lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Index of the output device.
    pub index: u32,
    /// The table that matched, if the kernel reports it.
    pub table: Option<u32>,
    /// The source that the kernel would choose, if it reports one.
    pub source: Option<IpAddr>,
}

fn to_message(prefix: IpNet, route: &Route, index: u32) -> RouteMessage {
    let protocol = RouteProtocol::Other(names::ROUTE_PROTOCOL);
    let overlay = route.device == Device::Overlay;
    let mut message = match prefix {
        IpNet::V4(p) => {
            let mut builder = RouteMessageBuilder::<Ipv4Addr>::new()
                .destination_prefix(p.addr(), p.prefix_len())
                .output_interface(index)
                .table_id(names::TABLE)
                .protocol(protocol)
                .scope(if overlay { RouteScope::Universe } else { RouteScope::Link });
            if overlay {
                builder = builder.gateway(names::OVERLAY_NEXT_HOP4).onlink();
            }
            if let Some(IpAddr::V4(source)) = route.source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
        IpNet::V6(p) => {
            let mut builder = RouteMessageBuilder::<Ipv6Addr>::new()
                .destination_prefix(p.addr(), p.prefix_len())
                .output_interface(index)
                .table_id(names::TABLE)
                .protocol(protocol);
            if overlay {
                builder = builder.gateway(names::OVERLAY_NEXT_HOP6).onlink();
            }
            if let Some(IpAddr::V6(source)) = route.source {
                builder = builder.pref_source(source);
            }
            builder.build()
        }
    };
    message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    message
}

fn as_route(message: &RouteMessage, indexes: Indexes) -> Route {
    let mut route = Route { device: Device::Overlay, source: None, mtu: 0 };
    let mut index = 0;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(oif) => index = *oif,
            RouteAttribute::PrefSource(source) => route.source = address(source),
            RouteAttribute::Metrics(metrics) => {
                route.mtu = metrics
                    .iter()
                    .find_map(|m| if let RouteMetric::Mtu(mtu) = m { Some(*mtu) } else { None })
                    .unwrap_or(0);
            }
            _ => {}
        }
    }
    if Some(index) == indexes.tunnel {
        route.device = Device::Tunnel;
    } else if index != indexes.overlay {
        // No plan has an MTU of 0.
        route.mtu = 0;
    }
    route
}

pub(super) fn table_of(message: &RouteMessage) -> u32 {
    let long =
        message.attributes.iter().find_map(|a| if let RouteAttribute::Table(table) = a { Some(*table) } else { None });
    long.unwrap_or(u32::from(message.header.table))
}

fn destination(message: &RouteMessage) -> Option<IpNet> {
    let address = message
        .attributes
        .iter()
        .find_map(|a| if let RouteAttribute::Destination(d) = a { address(d) } else { None })?;
    IpNet::new(address, message.header.destination_prefix_length).ok()
}

fn address(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}
