//! Detours: connections to kubelet ports of other pools' nodes leave the ordinary way. On a cloud gateway node they end as if the address
//! were its own; on an ordinary cloud node they go to the gateway node by the overlay.
//!
//! An own table with one route per address, under one rule per port: other ports of these addresses are untouched, and the way of a
//! packet costs as many rules as there are ports, however many sites.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv4Addr,
};

use futures::TryStreamExt;
use netlink_packet_route::{
    IpProtocol,
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Error, Links, failed, route::table_of};
use crate::names;

/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// Where the packets go instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// To this node itself.
    Local,
    /// Out by this device (`raven0`).
    Overlay(u32),
}

/// What should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Detour {
    /// Where the packets go.
    pub way: Way,
    /// Addresses of other pools' nodes.
    pub addresses: BTreeSet<Ipv4Addr>,
    /// TCP ports.
    pub ports: BTreeSet<u16>,
    /// Source of host processes' packets: answers come back to it.
    pub source: Ipv4Addr,
}

impl Links {
    /// Brings table and rules to what they should be (`None`: nothing); gives how many things were changed.
    pub async fn ensure_detour(&self, want: Option<&Detour>) -> Result<u32, Error> {
        let (none, no_ports) = (BTreeSet::new(), BTreeSet::new());
        let (addresses, ports) = want.map_or((&none, &no_ports), |d| (&d.addresses, &d.ports));
        let mut changes = 0;
        // Rules lead to routes: they come last, and go first.
        let rules = self.detour_rules().await?;
        for (port, rule) in rules.iter().filter(|(port, _)| !ports.contains(port)) {
            self.handle.rule().del(rule.clone()).execute().await.map_err(failed(format!("remove the rule for TCP port {port}")))?;
            changes += 1;
        }
        let routes = self.detour_routes().await?;
        if let Some(detour) = want {
            for address in addresses.iter().filter(|a| routes.get(a).is_none_or(|have| !detour.is(have))) {
                let message = detour.route(*address);
                let action = format!("put route {address} into table {}", names::DETOUR_TABLE);
                self.handle.route().add(message).replace().execute().await.map_err(failed(action))?;
                changes += 1;
            }
        }
        for (address, message) in routes.iter().filter(|(address, _)| !addresses.contains(address)) {
            self.handle.route().del(message.clone()).execute().await.map_err(failed(format!("remove route {address}")))?;
            changes += 1;
        }
        for port in ports.iter().filter(|port| !rules.contains_key(port)) {
            let mut request =
                self.handle.rule().add().v4().table_id(names::DETOUR_TABLE).priority(names::DETOUR_PRIORITY).action(RuleAction::ToTable);
            let attributes = &mut request.message_mut().attributes;
            attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)));
            attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
            attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start: *port, end: *port }));
            request.execute().await.map_err(failed(format!("make the rule for TCP port {port}")))?;
            changes += 1;
        }
        Ok(changes)
    }

    async fn detour_rules(&self) -> Result<BTreeMap<u16, RuleMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.rule().get(IpVersion::V4).execute();
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            let ours = rule.attributes.contains(&RuleAttribute::Table(names::DETOUR_TABLE));
            if ours && rule.attributes.contains(&RuleAttribute::Priority(names::DETOUR_PRIORITY)) {
                let port =
                    rule.attributes.iter().find_map(|a| if let RuleAttribute::DestinationPortRange(r) = a { Some(r.start) } else { None });
                found.insert(port.unwrap_or(0), rule);
            }
        }
        Ok(found)
    }

    async fn detour_routes(&self) -> Result<BTreeMap<Ipv4Addr, RouteMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(message) = stream.try_next().await.map_err(failed("list routes"))? {
            if table_of(&message) != names::DETOUR_TABLE {
                continue;
            }
            let address = message.attributes.iter().find_map(|a| match a {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
                _ => None,
            });
            if let Some(address) = address {
                found.insert(address, message);
            }
        }
        Ok(found)
    }
}

impl Detour {
    fn route(&self, address: Ipv4Addr) -> RouteMessage {
        let builder = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .table_id(names::DETOUR_TABLE)
            .protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL))
            .pref_source(self.source);
        match self.way {
            Way::Local => builder.output_interface(LOOPBACK).scope(RouteScope::Host).kind(RouteType::Local).build(),
            Way::Overlay(index) => builder.output_interface(index).gateway(names::OVERLAY_NEXT_HOP4).onlink().build(),
        }
    }

    /// A route that is there already, as it should be.
    fn is(&self, have: &RouteMessage) -> bool {
        let (index, kind) = match self.way {
            Way::Local => (LOOPBACK, RouteType::Local),
            Way::Overlay(index) => (index, RouteType::Unicast),
        };
        have.header.kind == kind
            && have.attributes.contains(&RouteAttribute::Oif(index))
            && have.attributes.contains(&RouteAttribute::PrefSource(RouteAddress::Inet(self.source)))
    }
}
