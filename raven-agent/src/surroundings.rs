//! Settings, routes and firewall rules of other programs that stop Raven's packets: detected and reported
//! with the remedy.
//!
//! This module only reads. Raven's own objects are restored by the drivers.

use std::{collections::BTreeSet, fs, net::IpAddr};

use ipnet::IpNet;
use serde_json::Value;

use crate::{
    link::{Links, Uplink},
    names,
    nft::{self, objects, text},
    plan::Plan,
    state::{Abilities, Device, Indexes, InterceptTo, Role},
};

/// CNIs that can pass pods' packets to other nodes without the host's rules. For the host's own packets they have then a
/// route to the other nodes' pods by a device of theirs, which shows that mode. Device, CNI and remedy.
const BYPASSES: [(&str, &str, &str); 4] = [
    ("cilium_host", "Cilium in tunnel mode", "set its routingMode to native"),
    ("antrea-gw0", "Antrea in encap mode", "set its trafficEncapMode to noEncap"),
    ("ovn-k8s-mp0", "OVN-Kubernetes", WITHOUT_L3),
    ("ovn0", "Kube-OVN", WITHOUT_L3),
];
const WITHOUT_L3: &str = "Raven's L3 half cannot be used with it; set enable-l3-tunnel: \"false\" in ConfigMap raven-cfg to keep the L7 half";

/// What stops packets, one sentence each.
pub async fn check(links: &Links, plan: &Plan, indexes: Indexes, uplink: &Uplink) -> Vec<String> {
    let is_address = |prefix: &IpNet| prefix.prefix_len() == prefix.max_prefix_len();
    let own: Vec<IpNet> = plan.own_prefixes().into_iter().filter(|prefix| !is_address(prefix)).collect();
    let mut complaints = forwarding(&own, |path| fs::read_to_string(path).ok());
    complaints.extend(overriding_routes(links, plan, indexes).await);
    complaints.extend(bypasses(links, plan).await);
    match ruleset().await {
        Ok(ruleset) => {
            let devices = [(names::TUNNEL, plan.tunnel.is_some()), (names::OVERLAY, uses_overlay(plan))];
            for (device, _) in devices.into_iter().filter(|(_, used)| *used) {
                complaints.extend(forward_drops(&ruleset, &own, device));
            }
            let wan = uplink.wan.as_ref().filter(|_| plan.role == Role::Gateway).map_or(&uplink.name, |wan| &wan.name);
            let tunnel = plan.tunnel.as_ref().map(|tunnel| (tunnel.port, wan.as_str()));
            let overlay = (raven_common::OVERLAY_PORT, uplink.name.as_str());
            complaints.extend(blocked_ports(&ruleset, Some(overlay).filter(|_| has_overlay(plan)), tunnel));
        }
        Err(e) => tracing::warn!(error = %e, "cannot read this node's firewall rules; they are not checked"),
    }
    complaints
}

/// True if this node exchanges overlay packets: with encryption, only those of intercepted connections.
pub fn has_overlay(plan: &Plan) -> bool {
    !plan.config.encrypted || plan.interception.is_some()
}

/// True if pods of this node send or receive by `raven0`.
fn uses_overlay(plan: &Plan) -> bool {
    plan.tunnel.is_none() || plan.interception.as_ref().is_some_and(|i| matches!(i.to, InterceptTo::Gateway(_)))
}

/// A node of the pool that gets this node's overlay packets with another source than it expects, and drops them.
pub fn wrong_source(role: Role, own: IpAddr, uplink: &Uplink, abilities: Abilities) -> Option<String> {
    // A gateway node writes an IPv4 outer header itself, unless it has several devices.
    if abilities.sets_source || (role == Role::Gateway && abilities.one_uplink && own.is_ipv4()) {
        return None;
    }
    // An address of no device is one that a NAT gives it.
    if !uplink.node_addresses.contains(&own) {
        return None;
    }
    let (other, source) = uplink.sources.iter().find(|(_, source)| *source != own)?;
    Some(format!(
        "this kernel sends packets for node {other} from {source}, and that node accepts only {own}, the InternalIP of this node: add \
         `src {own}` to the route that `ip route get {other}` shows, or use Linux 5.19 or later, where Raven sets the source"
    ))
}

/// The kernel's neighbour table of `family` (`ipv4`, `ipv6`) was too small.
pub fn overflow(family: &str) -> String {
    let name = if family == "ipv6" { "NDP" } else { "ARP" };
    format!(
        "the kernel's {family} neighbour table ({name}) was full in the last ten minutes, so packets to other nodes of the pool were lost: \
         sysctl -w net.{family}.neigh.default.gc_thresh3=8192 net.{family}.neigh.default.gc_thresh2=4096, or more, and keep both in /etc/sysctl.d"
    )
}

/// Pods are reached by forwarding, so a node that does not forward has no reachable pods. `own`: this node's prefixes.
fn forwarding(own: &[IpNet], read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let families = [
        ("IPv4", true, "/proc/sys/net/ipv4/ip_forward", "net.ipv4.ip_forward"),
        ("IPv6", false, "/proc/sys/net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
    ];
    families
        .iter()
        .filter(|(_, v4, path, _)| {
            own.iter().any(|prefix| prefix.addr().is_ipv4() == *v4) && read(path).is_some_and(|value| value.trim() == "0")
        })
        .map(|(family, _, _, key)| {
            format!(
                "{family} forwarding is off on this node, so its pods have no connections to other nodes: sysctl -w {key}=1"
            )
        })
        .collect()
}

/// Rules or routes of other programs that match before Raven's: looks up the route to one address of each pool.
async fn overriding_routes(links: &Links, plan: &Plan, indexes: Indexes) -> Vec<String> {
    let mut asked = BTreeSet::new();
    let mut complaints = Vec::new();
    for (prefix, route) in &plan.state.routes {
        let gateway = plan.state.remote.get(prefix).map(|r| r.gateway);
        if !asked.insert((gateway, prefix.addr().is_ipv4())) {
            continue;
        }
        let wanted = if route.device == Device::Tunnel { indexes.tunnel } else { Some(indexes.overlay) };
        let Ok(Some(found)) = links.lookup(probe(prefix)).await else { continue };
        if Some(found.index) != wanted {
            let name = links.name(found.index).await.unwrap_or_else(|| found.index.to_string());
            let table = found.table.map_or(String::new(), |t| format!(" (table {t})"));
            complaints.push(format!(
                "packets for {prefix} leave by {name}{table} and not by Raven: a rule before {} or a route of another program matches first; \
                 compare `ip rule` and `ip route get {}`",
                names::RULE_PRIORITY,
                probe(prefix)
            ));
        }
    }
    complaints
}

/// CNIs that carry pods' packets for other pools themselves.
async fn bypasses(links: &Links, plan: &Plan) -> Vec<String> {
    let mut complaints = Vec::new();
    for (device, cni, remedy) in BYPASSES {
        let Ok(Some(found)) = links.find(device).await else { continue };
        let Ok(routes) = links.main_routes(found.index).await else { continue };
        let overlaps = |prefix: &&IpNet| routes.iter().any(|route| route.contains(*prefix) || prefix.contains(route));
        if let Some(prefix) = plan.state.routes.keys().find(overlaps) {
            complaints.push(format!(
                "{cni} carries pods' packets for {prefix} itself (device {device}), past this node's rules, so Raven does not forward them: \
                 {remedy} (docs/cni.md)"
            ));
        }
    }
    complaints
}

/// An address inside a prefix that a pod may have.
fn probe(prefix: &IpNet) -> IpAddr {
    prefix.hosts().nth(1).unwrap_or(prefix.addr())
}

/// The chains of all tables, and the rules of those tables in which a chain drops by its policy. kube-proxy's tables,
/// which have thousands of rules, have no such chain, so their rules are not read.
async fn ruleset() -> Result<Value, nft::Error> {
    let mut ruleset = nft::list(&["list", "chains"]).await?;
    for (family, table) in dropping_tables(&ruleset) {
        let mut listed = nft::list(&["list", "table", &family, &table]).await?;
        let rules = listed["nftables"].as_array_mut().map(std::mem::take).unwrap_or_default();
        if let Some(objects) = ruleset["nftables"].as_array_mut() {
            objects.extend(rules.into_iter().filter(|object| object.get("rule").is_some()));
        }
    }
    Ok(ruleset)
}

/// Family and name of the tables with a chain that drops forwarded or incoming packets by its policy.
fn dropping_tables(ruleset: &Value) -> BTreeSet<(String, String)> {
    objects(ruleset, "chain")
        .filter(|chain| (chain["hook"] == "forward" || chain["hook"] == "input") && chain["policy"] == "drop")
        .map(|chain| (text(chain, "family").to_owned(), text(chain, "table").to_owned()))
        .collect()
}

/// FORWARD chains with policy DROP (of nft, or of iptables as nft shows it) in whose table no rule accepts
/// this node's pods. `device`: the one of Raven's by which their packets arrive.
fn forward_drops(ruleset: &Value, own: &[IpNet], device: &str) -> Vec<String> {
    let drops = objects(ruleset, "chain").filter(|c| c["hook"] == "forward" && c["policy"] == "drop");
    drops
        .filter(|chain| !accepts_pods(ruleset, chain, own, device))
        .map(|chain| {
            let (family, table) = (text(chain, "family"), text(chain, "table"));
            format!(
                "chain {} of {family} table {table} drops forwarded packets (policy DROP, as docker and hardened systems set it), and no rule \
                 accepts {}: packets from other pools do not reach this node's pods. Accept them: \
                 iptables -I FORWARD -i {} -j ACCEPT; iptables -I FORWARD -o {} -j ACCEPT",
                text(chain, "name"),
                own.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
                device,
                device
            )
        })
        .collect()
}

/// True if a rule of the same table accepts and matches on the device, on a prefix that contains this node's pod
/// prefixes, or on nothing. Jumps are not followed: a rule in an unused chain is unlikely.
fn accepts_pods(ruleset: &Value, chain: &Value, own: &[IpNet], device: &str) -> bool {
    let v4 = chain["family"] != "ip6";
    let mine: Vec<&IpNet> = own.iter().filter(|p| p.addr().is_ipv4() == v4 || chain["family"] == "inet").collect();
    if mine.is_empty() {
        return true;
    }
    accepts(ruleset, chain, |condition| matches_pods(condition, &mine, device))
}

/// True if a rule of the chain's table accepts, and has either no condition or one that `wanted` selects.
fn accepts(ruleset: &Value, chain: &Value, wanted: impl Fn(&Value) -> bool) -> bool {
    let rules = objects(ruleset, "rule").filter(|r| r["family"] == chain["family"] && r["table"] == chain["table"]);
    rules.map(|rule| rule["expr"].as_array().map_or(&[][..], Vec::as_slice)).any(|statements| {
        // An extension that nft does not translate (`-m conntrack` of iptables) is a condition too, and
        // is never selected.
        let mut conditions = statements.iter().filter_map(|s| s.get("match").or_else(|| s.get("xt"))).peekable();
        statements.iter().any(|s| s.get("accept").is_some()) && (conditions.peek().is_none() || conditions.any(&wanted))
    })
}

fn matches_pods(condition: &Value, own: &[&IpNet], device: &str) -> bool {
    let right = &condition["right"];
    if right == device {
        return true;
    }
    nft::prefix(right).is_some_and(|p| own.iter().all(|o| p.contains(*o)))
}

/// INPUT chains with policy DROP in whose table no rule opens Raven's ports. Each port has the device by which its packets
/// arrive.
fn blocked_ports(ruleset: &Value, overlay: Option<(u16, &str)>, tunnel: Option<(u16, &str)>) -> Vec<String> {
    let drops: Vec<&Value> =
        objects(ruleset, "chain").filter(|c| c["hook"] == "input" && c["policy"] == "drop").collect();
    let tunnel = tunnel.map(|tunnel| (tunnel, "the WireGuard tunnel"));
    let ports: Vec<_> = overlay.map(|overlay| (overlay, "the overlay")).into_iter().chain(tunnel).collect();
    let mut complaints = Vec::new();
    for chain in drops.iter().filter(|c| c["family"] != "ip6") {
        for ((port, device), what) in &ports {
            if !accepts(ruleset, chain, |condition| opens(&condition["right"], *port) || condition["right"] == *device)
            {
                complaints.push(format!(
                    "chain {} of {} table {} drops incoming packets (policy DROP) and does not accept UDP port {port}, which {what} needs: \
                     iptables -I INPUT -p udp --dport {port} -j ACCEPT",
                    text(chain, "name"),
                    text(chain, "family"),
                    text(chain, "table"),
                ));
            }
        }
    }
    complaints
}

/// True if the right side of a match is this port, or a set or range that contains it.
fn opens(right: &Value, port: u16) -> bool {
    match right {
        Value::Number(n) => n.as_u64() == Some(u64::from(port)),
        Value::Object(o) => {
            let set = o.get("set").and_then(Value::as_array).is_some_and(|s| s.iter().any(|v| opens(v, port)));
            let range = o.get("range").and_then(Value::as_array).is_some_and(|r| {
                matches!((r.first().and_then(Value::as_u64), r.get(1).and_then(Value::as_u64)),
                         (Some(low), Some(high)) if (low..=high).contains(&u64::from(port)))
            });
            set || range
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn own() -> Vec<IpNet> {
        vec!["10.244.3.0/24".parse().expect("a prefix"), "fd00:3::/64".parse().expect("a prefix")]
    }

    fn forward(policy: &str, rules: Vec<Value>) -> Value {
        let chain = json!({ "chain": { "family": "ip", "table": "filter", "name": "FORWARD", "hook": "forward", "policy": policy } });
        let rules = rules
            .into_iter()
            .map(|expr| json!({ "rule": { "family": "ip", "table": "filter", "chain": "X", "expr": expr } }));
        json!({ "nftables": std::iter::once(chain).chain(rules).collect::<Vec<_>>() })
    }

    fn from(addr: &str, len: u8) -> Value {
        json!([{ "match": { "op": "==", "left": {}, "right": { "prefix": { "addr": addr, "len": len } } } }, { "accept": null }])
    }

    #[test]
    fn wrong_source_is_reported_where_the_kernel_chooses_it() {
        let own = IpAddr::from([10, 0, 0, 2]);
        let right = ([10, 0, 0, 3].into(), own);
        let wrong = ([10, 0, 0, 1].into(), [10, 0, 0, 77].into());
        let uplink = Uplink {
            name: "eth0".into(),
            index: 2,
            mtu: 1500,
            subnets: BTreeSet::new(),
            node_addresses: BTreeSet::from([own]),
            other_devices: Vec::new(),
            wan: None,
            sources: vec![right, wrong],
        };
        let reported = |role, sets_source, one_uplink| {
            let abilities = Abilities { redirects_into_tunnel: true, guards_in_xdp: true, sets_source, one_uplink };
            wrong_source(role, own, &uplink, abilities)
        };
        let complaint = reported(Role::Member, false, true).expect("a complaint");
        assert!(["10.0.0.1 ", "10.0.0.77", "src 10.0.0.2"].iter().all(|part| complaint.contains(part)), "{complaint}");
        assert!(reported(Role::Gateway, false, false).is_some(), "several devices");
        for (role, sets_source) in [(Role::Member, true), (Role::Gateway, false)] {
            assert_eq!(reported(role, sets_source, true), None, "{role:?}");
        }
    }

    #[test]
    fn forward_drop_is_reported_unless_a_rule_accepts_pods() {
        assert_eq!(forward_drops(&forward("accept", vec![]), &own(), names::OVERLAY), Vec::<String>::new());
        let complaint = &forward_drops(&forward("drop", vec![]), &own(), names::OVERLAY)[0];
        assert!(complaint.contains("10.244.3.0/24") && complaint.contains("iptables -I FORWARD"), "{complaint}");
        assert_eq!(
            forward_drops(&forward("drop", vec![from("192.168.0.0", 16)]), &own(), names::OVERLAY).len(),
            1,
            "another prefix"
        );
        // flannel accepts the prefix of the whole cluster. An `ip` table does not see the IPv6 prefix.
        assert_eq!(
            forward_drops(&forward("drop", vec![from("10.244.0.0", 16)]), &own(), names::OVERLAY),
            Vec::<String>::new()
        );
        let established =
            json!([{ "xt": { "type": "match", "name": "conntrack" } }, { "counter": {} }, { "accept": null }]);
        assert_eq!(
            forward_drops(&forward("drop", vec![established]), &own(), names::OVERLAY).len(),
            1,
            "only replies are accepted"
        );
        let device = json!([{ "match": { "op": "==", "left": { "meta": { "key": "iifname" } }, "right": "raven0" } }, { "accept": null }]);
        let ruleset = forward("drop", vec![device]);
        assert_eq!(forward_drops(&ruleset, &own(), names::OVERLAY), Vec::<String>::new());
        let complaint = &forward_drops(&ruleset, &own(), names::TUNNEL)[0];
        assert!(complaint.contains("iptables -I FORWARD -o raven-wg0"), "{complaint}");
    }

    #[test]
    fn input_drop_is_reported_with_the_port_to_accept() {
        let ruleset = |right: Value| {
            json!({ "nftables": [
                { "chain": { "family": "inet", "table": "fw", "name": "in", "hook": "input", "policy": "drop" } },
                { "rule": { "family": "inet", "table": "fw", "chain": "in",
                            "expr": [{ "match": { "op": "==", "left": {}, "right": right } }, { "accept": null }] } },
            ] })
        };
        assert_eq!(blocked_ports(&ruleset(json!(22)), Some((4472, "eth0")), Some((4500, "eth0"))).len(), 2);
        assert_eq!(
            blocked_ports(&ruleset(json!({ "set": [22, 4472, 4500] })), Some((4472, "eth0")), Some((4500, "eth0"))),
            Vec::<String>::new()
        );
        assert_eq!(
            blocked_ports(&ruleset(json!({ "range": [4400, 4480] })), Some((4472, "eth0")), Some((4500, "eth0"))).len(),
            1
        );
        assert_eq!(blocked_ports(&ruleset(json!(4472)), Some((4472, "eth0")), None), Vec::<String>::new());
    }

    #[test]
    fn only_tables_that_drop_by_policy_are_read() {
        let chain = |table: &str, hook: &str, policy: &str| json!({ "chain": { "family": "ip", "table": table, "name": "X", "hook": hook, "policy": policy } });
        let ruleset = json!({ "nftables": [
            { "metainfo": { "version": "1.0.6" } },
            { "chain": { "family": "ip", "table": "kube-proxy", "name": "service-1" } },
            chain("kube-proxy", "forward", "accept"),
            chain("filter", "forward", "drop"),
            chain("filter", "input", "drop"),
            chain("out", "output", "drop"),
            chain("in", "input", "drop"),
        ] });
        let wanted = ["filter", "in"].map(|table| ("ip".to_owned(), table.to_owned()));
        assert_eq!(dropping_tables(&ruleset), BTreeSet::from(wanted));
    }

    #[test]
    fn disabled_forwarding_is_reported() {
        assert_eq!(forwarding(&own(), |_| Some("1\n".into())), Vec::<String>::new());
        assert_eq!(forwarding(&own(), |_| Some("0\n".into())).len(), 2);
        assert_eq!(forwarding(&own()[..1], |_| Some("0\n".into())).len(), 1, "a node without IPv6 prefixes");
        assert_eq!(forwarding(&own(), |_| None), Vec::<String>::new(), "a kernel without the family");
    }
}
