//! Routes and rules of the interception: on a cloud gateway node, connections to kubelet ports of edge nodes are
//! delivered locally; on a member node of the cloud they go to the gateway node over the overlay. The same holds for the
//! ports of proxies of other exposed pools.
//!
//! Each of the two kinds has a table with one route per address, and one rule per port leads to it. Other ports of these
//! addresses are not affected, and the lookup cost grows with the number of ports, not of sites.

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
use crate::{
    names,
    state::{Change, InterceptTo, Interception},
};

/// Index of `lo` in every network namespace.
const LOOPBACK: u32 = 1;

/// The tables of the kubelets and of the proxies.
const TABLES: [u32; 2] = [names::INTERCEPTION_TABLE, names::PROXIES_TABLE];

/// The output of every route in the tables.
#[derive(Clone, Copy)]
struct Output {
    /// Index of the device.
    device: u32,
    /// `Local` delivers to this node; `Unicast` sends out of the device.
    kind: RouteType,
    source: Ipv4Addr,
}

impl Links {
    /// Brings the tables and their rules to the desired state; `None` removes them. `overlay`: index of `raven0`, without
    /// which nothing is sent to another node.
    pub async fn ensure_interception(
        &self,
        want: Option<&Interception>,
        overlay: Option<u32>,
    ) -> Result<Change, Error> {
        let want = want.and_then(|interception| Some(Tables::of(interception, Output::of(interception, overlay)?)));
        let Tables { rules: ports, routes } = want.unwrap_or_default();
        // Rules lead to routes: they are added last and deleted first.
        let rules = self.interception_rules().await?;
        let mut change = Change::NONE;
        for ((table, port), rule) in rules.iter().filter(|(rule, _)| !ports.contains(rule)) {
            let action = format!("delete the interception rule for TCP port {port} and table {table}");
            self.handle.rule().del(rule.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        change += self.ensure_interception_routes(&routes).await?;
        for (table, port) in ports.iter().filter(|rule| !rules.contains_key(rule)) {
            self.add_interception_rule(*table, *port).await?;
            change += Change::ONE;
        }
        Ok(change)
    }

    async fn ensure_interception_routes(&self, want: &BTreeMap<(u32, Ipv4Addr), Output>) -> Result<Change, Error> {
        let routes = self.interception_routes().await?;
        let mut change = Change::NONE;
        for (route, output) in want {
            if routes.get(route).is_some_and(|have| output.matches(have)) {
                continue;
            }
            let (table, address) = *route;
            let action = format!("add route {address} to table {table}");
            self.handle.route().add(output.route(table, address)).replace().execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        for ((table, address), message) in routes.iter().filter(|(route, _)| !want.contains_key(route)) {
            let action = format!("delete route {address} from table {table}");
            self.handle.route().del(message.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        Ok(change)
    }

    async fn add_interception_rule(&self, table: u32, port: u16) -> Result<(), Error> {
        let rule = self.handle.rule().add().v4().table_id(table).priority(names::INTERCEPTION_PRIORITY);
        let mut request = rule.action(RuleAction::ToTable);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)));
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
        attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port }));
        let action = format!("add the interception rule for TCP port {port} and table {table}");
        request.execute().await.map_err(failed(action))
    }

    async fn interception_rules(&self) -> Result<BTreeMap<(u32, u16), RuleMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.rule().get(IpVersion::V4).execute();
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            let table = TABLES.into_iter().find(|table| rule.attributes.contains(&RuleAttribute::Table(*table)));
            if let Some(table) = table
                && rule.attributes.contains(&RuleAttribute::Priority(names::INTERCEPTION_PRIORITY))
            {
                let port = rule
                    .attributes
                    .iter()
                    .find_map(|a| if let RuleAttribute::DestinationPortRange(r) = a { Some(r.start) } else { None });
                found.insert((table, port.unwrap_or(0)), rule);
            }
        }
        Ok(found)
    }

    async fn interception_routes(&self) -> Result<BTreeMap<(u32, Ipv4Addr), RouteMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(message) = stream.try_next().await.map_err(failed("list routes"))? {
            let table = table_of(&message);
            if !TABLES.contains(&table) {
                continue;
            }
            let address = message.attributes.iter().find_map(|a| match a {
                RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
                _ => None,
            });
            if let Some(address) = address {
                found.insert((table, address), message);
            }
        }
        Ok(found)
    }
}

/// The rules and routes of the interception.
#[derive(Default)]
struct Tables {
    /// Table and TCP port.
    rules: BTreeSet<(u32, u16)>,
    /// By table and address.
    routes: BTreeMap<(u32, Ipv4Addr), Output>,
}

impl Tables {
    fn of(interception: &Interception, output: Output) -> Self {
        let mut tables = Self::default();
        for (table, wanted) in TABLES.into_iter().zip([&interception.kubelets, &interception.proxies]) {
            // A rule to an empty table would only slow lookups down.
            if !wanted.nodes.is_empty() {
                tables.rules.extend(wanted.ports.iter().map(|port| (table, *port)));
            }
            tables.routes.extend(wanted.nodes.keys().map(|address| ((table, *address), output)));
        }
        tables
    }
}

impl Output {
    fn of(interception: &Interception, overlay: Option<u32>) -> Option<Self> {
        let (device, kind) = match interception.to {
            InterceptTo::Here => (LOOPBACK, RouteType::Local),
            InterceptTo::Gateway(_) => (overlay?, RouteType::Unicast),
        };
        Some(Self { device, kind, source: interception.source })
    }

    fn route(self, table: u32, address: Ipv4Addr) -> RouteMessage {
        let builder = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .table_id(table)
            .protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL))
            .pref_source(self.source)
            .output_interface(self.device)
            .kind(self.kind);
        match self.kind {
            RouteType::Local => builder.scope(RouteScope::Host).build(),
            _ => builder.gateway(names::OVERLAY_NEXT_HOP4).onlink().build(),
        }
    }

    /// True if an existing route has this output.
    fn matches(self, have: &RouteMessage) -> bool {
        have.header.kind == self.kind
            && have.attributes.contains(&RouteAttribute::Oif(self.device))
            && have.attributes.contains(&RouteAttribute::PrefSource(RouteAddress::Inet(self.source)))
    }
}
