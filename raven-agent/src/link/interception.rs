//! Routes and rules of the interception: on a cloud gateway node, connections to kubelet ports of edge nodes are
//! delivered locally; on a member node of the cloud they go to the gateway node over the overlay. The same holds for the
//! ports of proxies of other exposed pools.
//!
//! Each of the two kinds has a table with one route per address, and one rule per port leads to it. Other ports of these
//! addresses are not affected, and the lookup cost grows with the number of ports, not of sites.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use futures::TryStreamExt;
use ipnet::IpNet;
use netlink_packet_route::{
    IpProtocol,
    route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange},
};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Error, Links, failed, route::versions};
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
    /// Sources, at most one per family.
    sources: [Option<IpAddr>; 2],
}

/// A rule that leads to a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Rule {
    table: u32,
    /// TCP port.
    port: u16,
    ipv6: bool,
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
        let want = want.unwrap_or_default();
        let (rules, routes) = (self.interception_rules().await?, self.interception_routes().await?);
        // Each family by itself: where the kernel refuses IPv6 (disabled on a device, a tentative address), IPv4 works.
        let mut changes = Vec::new();
        for ipv6 in [false, true] {
            changes.push(self.ensure_family(&want, ipv6, &rules, &routes).await);
        }
        changes.into_iter().sum()
    }

    async fn ensure_family(
        &self,
        want: &Tables,
        ipv6: bool,
        rules: &BTreeMap<Rule, RuleMessage>,
        routes: &BTreeMap<(u32, IpAddr), RouteMessage>,
    ) -> Result<Change, Error> {
        // Rules lead to routes: they are added last and deleted first.
        let mut change = Change::NONE;
        for (rule, message) in rules.iter().filter(|(rule, _)| rule.ipv6 == ipv6 && !want.rules.contains(rule)) {
            let action = format!("delete the interception {rule}");
            self.handle.rule().del(message.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        for (route, output) in want.routes.iter().filter(|((_, to), _)| to.is_ipv6() == ipv6) {
            let (table, to) = *route;
            if routes.get(route).is_some_and(|have| output.matches(to, have)) {
                continue;
            }
            let action = format!("add route {to} to table {table}");
            self.handle.route().add(output.route(table, to)).replace().execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        let is_surplus = |route: &(u32, IpAddr)| route.1.is_ipv6() == ipv6 && !want.routes.contains_key(route);
        for ((table, to), message) in routes.iter().filter(|(route, _)| is_surplus(route)) {
            let action = format!("delete route {to} from table {table}");
            self.handle.route().del(message.clone()).execute().await.map_err(failed(action))?;
            change += Change::ONE;
        }
        for rule in want.rules.iter().filter(|rule| rule.ipv6 == ipv6 && !rules.contains_key(rule)) {
            self.add_interception_rule(*rule).await?;
            change += Change::ONE;
        }
        Ok(change)
    }

    async fn add_interception_rule(&self, rule: Rule) -> Result<(), Error> {
        let request = self.handle.rule().add().table_id(rule.table).priority(names::INTERCEPTION_PRIORITY);
        let mut request = request.action(RuleAction::ToTable);
        let attributes = &mut request.message_mut().attributes;
        attributes.push(RuleAttribute::Protocol(RouteProtocol::Other(names::ROUTE_PROTOCOL)));
        attributes.push(RuleAttribute::IpProtocol(IpProtocol::Tcp));
        attributes.push(RuleAttribute::DestinationPortRange(RulePortRange { start: rule.port, end: rule.port }));
        let added = if rule.ipv6 { request.v6().execute().await } else { request.v4().execute().await };
        added.map_err(failed(format!("add the interception {rule}")))
    }

    async fn interception_rules(&self) -> Result<BTreeMap<Rule, RuleMessage>, Error> {
        let mut found = BTreeMap::new();
        for version in versions() {
            let ipv6 = matches!(version, IpVersion::V6);
            let mut stream = self.handle.rule().get(version).execute();
            while let Some(rule) = stream.try_next().await.map_err(failed("list rules"))? {
                let table = TABLES.into_iter().find(|table| rule.attributes.contains(&RuleAttribute::Table(*table)));
                if let Some(table) = table
                    && rule.attributes.contains(&RuleAttribute::Priority(names::INTERCEPTION_PRIORITY))
                {
                    let range = |a: &RuleAttribute| match a {
                        RuleAttribute::DestinationPortRange(range) => Some(range.start),
                        _ => None,
                    };
                    let port = rule.attributes.iter().find_map(range).unwrap_or(0);
                    found.insert(Rule { table, port, ipv6 }, rule);
                }
            }
        }
        Ok(found)
    }

    async fn interception_routes(&self) -> Result<BTreeMap<(u32, IpAddr), RouteMessage>, Error> {
        let mut found = BTreeMap::new();
        let found_route = |table, to: IpNet, message| drop(found.insert((table, to.addr()), message));
        self.each_route(&TABLES, found_route).await?;
        Ok(found)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        write!(f, "rule ({family}) for TCP port {} and table {}", self.port, self.table)
    }
}

/// The rules and routes of the interception.
#[derive(Default)]
struct Tables {
    rules: BTreeSet<Rule>,
    /// By table and address.
    routes: BTreeMap<(u32, IpAddr), Output>,
}

impl Tables {
    fn of(interception: &Interception, output: Output) -> Self {
        let mut tables = Self::default();
        for (table, wanted) in TABLES.into_iter().zip([&interception.kubelets, &interception.proxies]) {
            // A rule to an empty table would only slow lookups down.
            let families: BTreeSet<bool> = wanted.nodes.keys().map(IpAddr::is_ipv6).collect();
            let rules = families.iter().flat_map(|ipv6| wanted.ports.iter().map(|port| (*port, *ipv6)));
            tables.rules.extend(rules.map(|(port, ipv6)| Rule { table, port, ipv6 }));
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
        let source = |ipv4| interception.sources.iter().copied().find(|source| source.is_ipv4() == ipv4);
        Some(Self { device, kind, sources: [true, false].map(source) })
    }

    fn source_for(self, address: IpAddr) -> Option<IpAddr> {
        self.sources.into_iter().flatten().find(|source| source.is_ipv4() == address.is_ipv4())
    }

    fn route(self, table: u32, to: IpAddr) -> RouteMessage {
        let is_local = self.kind == RouteType::Local;
        let mut message = match to {
            IpAddr::V4(to) => {
                let builder = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to, 32);
                match is_local {
                    true => builder.scope(RouteScope::Host).build(),
                    false => builder.gateway(names::OVERLAY_NEXT_HOP4).onlink().build(),
                }
            }
            IpAddr::V6(to) => {
                let builder = RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(to, 128);
                match is_local {
                    true => builder.build(),
                    false => builder.gateway(names::OVERLAY_NEXT_HOP6).onlink().build(),
                }
            }
        };
        message.header.kind = self.kind;
        message.header.protocol = RouteProtocol::Other(names::ROUTE_PROTOCOL);
        message.attributes.push(RouteAttribute::Table(table));
        message.attributes.push(RouteAttribute::Oif(self.device));
        message.attributes.extend(self.source_for(to).map(|source| RouteAttribute::PrefSource(source.into())));
        message
    }

    /// True if an existing route to `to` has this output.
    fn matches(self, to: IpAddr, have: &RouteMessage) -> bool {
        let source = self.source_for(to).map(|source| RouteAttribute::PrefSource(source.into()));
        have.header.kind == self.kind
            && have.attributes.contains(&RouteAttribute::Oif(self.device))
            && source.is_none_or(|source| have.attributes.contains(&source))
    }
}
