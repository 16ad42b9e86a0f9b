//! What is around us and not ours to change, but stops packets all the same: found, and said with the remedy.
//!
//! Looked at after each run. What belongs to us is mended elsewhere; nothing here changes anything.

use std::{collections::BTreeSet, fs, net::IpAddr};

use ipnet::IpNet;
use nftables::helper;
use serde_json::Value;

use crate::{
    diff::Device,
    link::Links,
    names,
    plan::{Indexes, Plan},
};

/// Complaints, one sentence each.
pub async fn look(links: &Links, plan: &Plan, indexes: Indexes, uplink: &str) -> Vec<String> {
    let mut complaints = forwarding(|path| fs::read_to_string(path).ok());
    complaints.extend(winning_routes(links, plan, indexes).await);
    if let Ok(ruleset) = ruleset().await {
        complaints.extend(forward_drops(&ruleset, &own_prefixes(plan)));
        complaints.extend(blocked_ports(&ruleset, uplink, plan.tunnel.as_ref().map(|t| t.port)));
    }
    complaints
}

/// Pods are reached by forwarding; a node that does not forward has none that can be reached.
fn forwarding(read: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let off = |path: &str| read(path).is_some_and(|value| value.trim() == "0");
    let mut complaints = Vec::new();
    if off("/proc/sys/net/ipv4/ip_forward") {
        complaints
            .push("IPv4 forwarding is off on this node, so its pods reach nobody outside: sysctl -w net.ipv4.ip_forward=1".to_owned());
    }
    complaints
}

/// Somebody's rule or route that takes our packets: asks the kernel where one address of each pool's would go.
async fn winning_routes(links: &Links, plan: &Plan, indexes: Indexes) -> Vec<String> {
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
                "packets for {prefix} leave by {name}{table} and not by Raven: a rule before {} or a route of somebody else wins; \
                 look at `ip rule` and `ip route get {}`",
                names::RULE_PRIORITY,
                probe(prefix)
            ));
        }
    }
    complaints
}

/// An address inside a prefix that a pod might have.
fn probe(prefix: &IpNet) -> IpAddr {
    prefix.hosts().nth(1).unwrap_or(prefix.addr())
}

fn own_prefixes(plan: &Plan) -> Vec<IpNet> {
    let own = plan.config.node.octets();
    plan.state.local.iter().filter(|(_, local)| local.node == own).map(|(prefix, _)| *prefix).collect()
}

async fn ruleset() -> Result<Value, String> {
    let text = helper::get_current_ruleset_raw_async(helper::DEFAULT_NFT, ["list", "ruleset"]).await.map_err(|e| e.to_string())?;
    serde_json::from_str(&text).map_err(|e| e.to_string())
}

fn objects<'a>(ruleset: &'a Value, kind: &'a str) -> impl Iterator<Item = &'a Value> {
    ruleset["nftables"].as_array().into_iter().flatten().filter_map(move |o| o.get(kind))
}

/// A FORWARD policy of DROP, in either backend of iptables that nft shows or in nft itself, under which nothing lets this
/// node's pods through.
fn forward_drops(ruleset: &Value, own: &[IpNet]) -> Vec<String> {
    let drops = objects(ruleset, "chain").filter(|c| c["hook"] == "forward" && c["policy"] == "drop");
    drops
        .filter(|chain| !lets_pods_through(ruleset, chain, own))
        .map(|chain| {
            let (family, table) = (text(chain, "family"), text(chain, "table"));
            format!(
                "chain {} of {family} table {table} drops what is forwarded (policy DROP, as docker and hardened systems set it), and no rule \
                 there accepts {}: packets from other pools do not reach this node's pods. Accept them: \
                 iptables -I FORWARD -i {} -j ACCEPT; iptables -I FORWARD -o {} -j ACCEPT",
                text(chain, "name"),
                own.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
                names::OVERLAY,
                names::OVERLAY
            )
        })
        .collect()
}

fn text<'a>(object: &'a Value, key: &str) -> &'a str {
    object[key].as_str().unwrap_or("?")
}

/// Any rule of the same table that accepts and speaks of our devices, of a prefix that holds a pod prefix of this node, or
/// of nothing at all. Chains are not followed: a rule in a chain that nobody jumps to would be strange.
fn lets_pods_through(ruleset: &Value, chain: &Value, own: &[IpNet]) -> bool {
    let v4 = chain["family"] != "ip6";
    let mine: Vec<&IpNet> = own.iter().filter(|p| p.addr().is_ipv4() == v4 || chain["family"] == "inet").collect();
    if mine.is_empty() {
        return true;
    }
    accepts(ruleset, chain, |matching| speaks_of(matching, &mine))
}

/// True if a rule of the chain's table accepts, and says `wanted` in one of its conditions, or has none.
fn accepts(ruleset: &Value, chain: &Value, wanted: impl Fn(&Value) -> bool) -> bool {
    let rules = objects(ruleset, "rule").filter(|r| r["family"] == chain["family"] && r["table"] == chain["table"]);
    rules.map(|rule| rule["expr"].as_array().map_or(&[][..], Vec::as_slice)).any(|statements| {
        // What nft does not understand itself (`-m conntrack` of iptables) is a condition, too, and says nothing that we look for.
        let mut conditions = statements.iter().filter_map(|s| s.get("match").or_else(|| s.get("xt"))).peekable();
        statements.iter().any(|s| s.get("accept").is_some()) && (conditions.peek().is_none() || conditions.any(&wanted))
    })
}

fn speaks_of(matching: &Value, own: &[&IpNet]) -> bool {
    let right = &matching["right"];
    if matches!(right.as_str(), Some(names::OVERLAY | names::TUNNEL)) {
        return true;
    }
    let prefix =
        right.get("prefix").and_then(|p| IpNet::new(p["addr"].as_str()?.parse().ok()?, u8::try_from(p["len"].as_u64()?).ok()?).ok());
    prefix.is_some_and(|p| own.iter().all(|o| p.contains(*o)))
}

/// An INPUT policy of DROP that nobody opened for our ports.
fn blocked_ports(ruleset: &Value, uplink: &str, tunnel: Option<u16>) -> Vec<String> {
    let drops: Vec<&Value> = objects(ruleset, "chain").filter(|c| c["hook"] == "input" && c["policy"] == "drop").collect();
    let ports = [(raven_common::OVERLAY_PORT, "the overlay"), (tunnel.unwrap_or(0), "the WireGuard tunnel")];
    let mut complaints = Vec::new();
    for chain in drops.iter().filter(|c| c["family"] != "ip6") {
        for (port, what) in ports.iter().filter(|(port, _)| *port != 0) {
            if !accepts(ruleset, chain, |matching| opens(&matching["right"], *port) || matching["right"] == uplink) {
                complaints.push(format!(
                    "chain {} of {} table {} drops what comes in (policy DROP) and does not open UDP {port}, which {what} needs: \
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

/// A port, a set or a range with it.
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
        let rules = rules.into_iter().map(|expr| json!({ "rule": { "family": "ip", "table": "filter", "chain": "X", "expr": expr } }));
        json!({ "nftables": std::iter::once(chain).chain(rules).collect::<Vec<_>>() })
    }

    fn from(addr: &str, len: u8) -> Value {
        json!([{ "match": { "op": "==", "left": {}, "right": { "prefix": { "addr": addr, "len": len } } } }, { "accept": null }])
    }

    #[test]
    fn a_forward_policy_of_drop_is_named_unless_something_lets_pods_through() {
        assert_eq!(forward_drops(&forward("accept", vec![]), &own()), Vec::<String>::new());
        let complaint = &forward_drops(&forward("drop", vec![]), &own())[0];
        assert!(complaint.contains("10.244.3.0/24") && complaint.contains("iptables -I FORWARD"), "{complaint}");
        assert_eq!(forward_drops(&forward("drop", vec![from("192.168.0.0", 16)]), &own()).len(), 1, "another prefix");
        // flannel's: the whole cluster's prefix. The IPv6 prefix is none of an `ip` table's business.
        assert_eq!(forward_drops(&forward("drop", vec![from("10.244.0.0", 16)]), &own()), Vec::<String>::new());
        let established = json!([{ "xt": { "type": "match", "name": "conntrack" } }, { "counter": {} }, { "accept": null }]);
        assert_eq!(forward_drops(&forward("drop", vec![established]), &own()).len(), 1, "answers alone are let through");
        let device = json!([{ "match": { "op": "==", "left": { "meta": { "key": "iifname" } }, "right": "raven0" } }, { "accept": null }]);
        assert_eq!(forward_drops(&forward("drop", vec![device]), &own()), Vec::<String>::new());
    }

    #[test]
    fn a_closed_input_chain_is_named_with_the_port_that_it_should_open() {
        let ruleset = |right: Value| {
            json!({ "nftables": [
                { "chain": { "family": "inet", "table": "fw", "name": "in", "hook": "input", "policy": "drop" } },
                { "rule": { "family": "inet", "table": "fw", "chain": "in",
                            "expr": [{ "match": { "op": "==", "left": {}, "right": right } }, { "accept": null }] } },
            ] })
        };
        assert_eq!(blocked_ports(&ruleset(json!(22)), "eth0", Some(4500)).len(), 2);
        assert_eq!(blocked_ports(&ruleset(json!({ "set": [22, 4472, 4500] })), "eth0", Some(4500)), Vec::<String>::new());
        assert_eq!(blocked_ports(&ruleset(json!({ "range": [4400, 4480] })), "eth0", Some(4500)).len(), 1);
        assert_eq!(blocked_ports(&ruleset(json!(4472)), "eth0", None), Vec::<String>::new());
    }

    #[test]
    fn a_node_that_does_not_forward_is_told() {
        assert_eq!(forwarding(|_| Some("1\n".into())), Vec::<String>::new());
        assert_eq!(forwarding(|_| Some("0\n".into())).len(), 1);
        assert_eq!(forwarding(|_| None), Vec::<String>::new(), "no IPv4 in this kernel");
    }
}
