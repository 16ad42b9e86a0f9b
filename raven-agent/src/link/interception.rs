//! Routes and rules of the interception: on a cloud gateway node, connections to kubelet ports of edge nodes are
//! delivered locally; on a member node of the cloud they go to the gateway node over the overlay.
//!
//! A table of its own has one route per address, and one rule per port leads to it. Other ports of these addresses are
//! not affected, and the lookup cost grows with the number of ports, not of sites.

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

/// The output of every route in the table.
#[derive(Clone, Copy)]
struct Output {
    /// Index of the device.
    device: u32,
    /// `Local` delivers to this node; `Unicast` sends out of the device.
    kind: RouteType,
    source: Ipv4Addr,
}

impl Links {
    /// Brings the table and its rules to the desired state; `None` removes them. `overlay`: index of `raven0`, without
    /// which nothing is sent to another node.
    pub async fn ensure_interception(
        &self,
        want: Option<&Interception>,
        overlay: Option<u32>,
    ) -> Result<Change, Error> {
        let want = want.and_then(|interception| Some((interception, Output::of(interception, overlay)?)));
        let ports = want.map_or_else(BTreeSet::new, |(interception, _)| interception.ports.clone());
        // Rules lead to routes: they are added last and deleted first.
        let rules = self.interception_rules().await?;
        let mut change = Change::NONE;
        for (port, rule) in rules.iter().filter(|(port, _)| !ports.contains(port)) {
            let action = format!("delete the interception rule for TCP port {port}");
            self.handle.rule().del(rule.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        change += self.ensure_interception_routes(want).await?;
        for port in ports.iter().filter(|port| !rules.contains_key(port)) {
            self.add_interception_rule(*port).await?;
            change += Change::ONE;
        }
        Ok(change)
    }

    async fn ensure_interception_routes(&self, want: Option<(&Interception, Output)>) -> Result<Change, Error> {
        let routes = self.interception_routes().await?;
        let mut change = Change::NONE;
        if let Some((interception, output)) = want {
            for address in interception.nodes.keys().filter(|a| routes.get(a).is_none_or(|have| !output.matches(have)))
            {
                let action = format!("add route {address} to table {}", names::INTERCEPTION_TABLE);
                self.handle.route().add(output.route(*address)).replace().execute().await.map_err(failed(action))?;
                change += Change::ONE;
            }
        }
        let wanted =
            |address: &Ipv4Addr| want.is_some_and(|(interception, _)| interception.nodes.contains_key(address));
        for (address, message) in routes.iter().filter(|(address, _)| !wanted(address)) {
            let action = format!("delete route {address} from table {}", names::INTERCEPTION_TABLE);
            self.handle.route().del(message.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        Ok(change)
    }

    async fn add_interception_rule(&self, port: u16) -> Result<(), Error> {
        let rule =
            self.handle.rule().add().v4().table_id(names::INTERCEPTION_TABLE).priority(names::INTERCEPTION_PRIORITY);
        let mut request = rule.action(RuleAction::ToTable);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)));
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
        attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start: port, end: port }));
        request.execute().await.map_err(failed(format!("add the interception rule for TCP port {port}")))
    }

    async fn interception_rules(&self) -> Result<BTreeMap<u16, RuleMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.rule().get(IpVersion::V4).execute();
        while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
            let table = rule.attributes.contains(&RuleAttribute::Table(names::INTERCEPTION_TABLE));
            if table && rule.attributes.contains(&RuleAttribute::Priority(names::INTERCEPTION_PRIORITY)) {
                let port = rule
                    .attributes
                    .iter()
                    .find_map(|a| if let RuleAttribute::DestinationPortRange(r) = a { Some(r.start) } else { None });
                found.insert(port.unwrap_or(0), rule);
            }
        }
        Ok(found)
    }

    async fn interception_routes(&self) -> Result<BTreeMap<Ipv4Addr, RouteMessage>, Error> {
        let mut found = BTreeMap::new();
        let mut stream = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()).execute();
        while let Some(message) = stream.try_next().await.map_err(failed("list routes"))? {
            if table_of(&message) != names::INTERCEPTION_TABLE {
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

impl Output {
    fn of(interception: &Interception, overlay: Option<u32>) -> Option<Self> {
        let (device, kind) = match interception.to {
            InterceptTo::Here => (LOOPBACK, RouteType::Local),
            InterceptTo::Gateway(_) => (overlay?, RouteType::Unicast),
        };
        Some(Self { device, kind, source: interception.source })
    }

    fn route(self, address: Ipv4Addr) -> RouteMessage {
        let builder = RouteMessageBuilder::<Ipv4Addr>::new()
            .destination_prefix(address, 32)
            .table_id(names::INTERCEPTION_TABLE)
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
