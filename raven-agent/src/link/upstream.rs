//! Rules and routes of OpenYurt's Raven: rule 100 for marked packets, and rule 101 with its table 9028.

use futures::TryStreamExt;
use netlink_packet_route::rule::{RuleAttribute, RuleMessage};
use rtnetlink::{IpVersion, RouteMessageBuilder};

use super::{Error, Links, failed, route::table_of};
use crate::{names, state::Change};

/// The routing table of its tunnel.
const TABLE: u32 = 9028;
/// Priority of the rule for [`TABLE`].
const PRIORITY: u32 = 101;
/// The mark that its rule for [`names::TABLE`] matches.
const MARK: u32 = 0x40;

impl Links {
    /// Counts its rules and routes (IPv4 only, as it is), or deletes them.
    pub async fn upstream_rules(&self, delete: bool) -> Result<Change, Error> {
        let mut change = Change::NONE;
        let rules: Vec<_> =
            self.handle.rule().get(IpVersion::V4).execute().try_collect().await.map_err(failed("list rules"))?;
        for rule in rules.into_iter().filter(is_upstreams) {
            if delete {
                self.handle.rule().del(rule).execute().await.map_err(failed("delete a rule of OpenYurt's Raven"))?;
            }
            change += Change::ONE;
        }
        let all = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
        let routes: Vec<_> =
            self.handle.route().get(all).execute().try_collect().await.map_err(failed("list routes"))?;
        for route in routes.into_iter().filter(|route| table_of(route) == TABLE) {
            if delete {
                self.handle.route().del(route).execute().await.map_err(failed("delete a route of table 9028"))?;
            }
            change += Change::ONE;
        }
        Ok(change)
    }
}

fn is_upstreams(rule: &RuleMessage) -> bool {
    let has = |attribute| rule.attributes.contains(&attribute);
    let leads_to = |priority, table| has(RuleAttribute::Priority(priority)) && has(RuleAttribute::Table(table));
    (leads_to(names::RULE_PRIORITY, names::TABLE) && has(RuleAttribute::FwMark(MARK))) || leads_to(PRIORITY, TABLE)
}
