//! The three rules for pools: what holds for a node that no label and no selector of a Gateway claims.
//!
//! 1. If a NodePool exists, its nodes are one pool. 2. If the cloud side has no NodePool, all cloud nodes are one pool.
//! 3. If the edge side has none, every edge node is a pool of its own.
//!
//! A rule makes a Gateway and never writes its spec again, so what a person adds to it (endpoints, a public address) stays. It goes when
//! no node is left for it. Which nodes it has is the rule's business as long as it bears our label; its nodeSelector says the same in
//! other words and starts to count when a person takes the label away and the Gateway over.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};
use raven_api::gateway::{ExposeType, Gateway, GatewaySpec};
use raven_api::{LABEL_EDGE_WORKER, LABEL_NODE_POOL, LABEL_NODE_POOL_OLD, MANAGER_CONTROLLER};

use super::inputs::{Inputs, LABEL_MANAGED_BY, NodeFacts, PoolFacts};
use super::membership::Membership;
use super::{GatewayName, NodeName};

const LABEL_HOSTNAME: &str = "kubernetes.io/hostname";

/// Which rule wants a Gateway. One value per Gateway.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    NodePool(String),
    Cloud,
    EdgeNode(NodeName),
}

/// Applies the rules to `free`, the nodes that nobody claims.
pub(super) fn apply(inputs: &Inputs, free: &[&NodeFacts], membership: &mut Membership) {
    let mut wanted: BTreeMap<Rule, Vec<&NodeFacts>> = BTreeMap::new();
    for node in free {
        match rule_for(inputs, node) {
            Ok(rule) => wanted.entry(rule).or_default().push(node),
            Err(why) => membership.strays.push(why),
        }
    }
    let mut kept = BTreeSet::new();
    for (rule, nodes) in &wanted {
        let Some(name) = name_for(inputs, rule) else {
            membership
                .strays
                .push(format!("nodes of rule {rule:?} have no pool: Gateways of both names it could have were written by hand"));
            continue;
        };
        if inputs.gateways.contains_key(&name) {
            nodes.iter().for_each(|node| membership.add(&name, &node.name));
        } else {
            membership.create.push(gateway_for(inputs, rule, &name, nodes));
        }
        kept.insert(name);
    }
    // One that has nodes by their label alone is in use: it stays.
    let unwanted = inputs.gateways.values().filter(|g| g.generated && !kept.contains(&g.name) && !membership.has_nodes(&g.name));
    membership.delete = unwanted.map(|g| g.name.clone()).collect();
}

fn rule_for(inputs: &Inputs, node: &NodeFacts) -> Result<Rule, String> {
    if let Some(pool) = pool_of(inputs, node) {
        return Ok(Rule::NodePool(pool.name.clone()));
    }
    let edge = node.is_edge();
    if inputs.pools.values().any(|pool| pool.edge == edge) {
        let side = if edge { "edge" } else { "cloud" };
        return Err(format!(
            "{side} node {} belongs to no pool: there are NodePools on the {side} side and it is in none of them; label it {LABEL_NODE_POOL}=<name>, or claim it by a Gateway",
            node.name
        ));
    }
    Ok(if edge { Rule::EdgeNode(node.name.clone()) } else { Rule::Cloud })
}

fn pool_of<'a>(inputs: &'a Inputs, node: &NodeFacts) -> Option<&'a PoolFacts> {
    let labelled = [LABEL_NODE_POOL, LABEL_NODE_POOL_OLD].into_iter().filter_map(|key| node.label(key));
    let listed = || inputs.pools.values().find(|pool| pool.nodes.contains(&node.name));
    labelled.filter_map(|name| inputs.pools.get(name)).next().or_else(listed).map(AsRef::as_ref)
}

// A person's Gateway of the same name is a person's: the rule takes another name beside it.
fn name_for(inputs: &Inputs, rule: &Rule) -> Option<GatewayName> {
    let base = match rule {
        Rule::NodePool(pool) => format!("pool-{pool}"),
        Rule::Cloud => "cloud".to_owned(),
        Rule::EdgeNode(node) => format!("node-{node}"),
    };
    let names = [GatewayName::from(base.as_str()), GatewayName::from(format!("{base}-auto").as_str())];
    names.into_iter().find(|name| inputs.gateways.get(name).is_none_or(|g| g.generated))
}

fn gateway_for(inputs: &Inputs, rule: &Rule, name: &GatewayName, nodes: &[&NodeFacts]) -> Gateway {
    let (exposed, selector) = match rule {
        Rule::NodePool(pool) => (inputs.pools.get(pool).is_some_and(|p| !p.edge), equals(LABEL_NODE_POOL, pool)),
        // Endpoints stay empty: every ready node is a candidate, and others dial its InternalIP until somebody says better.
        Rule::Cloud => (true, not_in(LABEL_EDGE_WORKER, "true")),
        Rule::EdgeNode(node) => {
            // Usually the node's name, but the kubelet may be told otherwise.
            let hostname = nodes.first().and_then(|n| n.label(LABEL_HOSTNAME)).unwrap_or(node.as_str());
            (false, equals(LABEL_HOSTNAME, hostname))
        }
    };
    Gateway {
        metadata: ObjectMeta {
            name: Some(name.to_string()),
            labels: Some([(LABEL_MANAGED_BY.to_owned(), MANAGER_CONTROLLER.to_owned())].into()),
            ..Default::default()
        },
        spec: GatewaySpec {
            node_selector: Some(selector),
            expose_type: if exposed { ExposeType::PublicIP } else { ExposeType::Edge },
            ..Default::default()
        },
        status: None,
    }
}

fn equals(key: &str, value: &str) -> LabelSelector {
    LabelSelector { match_labels: Some([(key.to_owned(), value.to_owned())].into()), match_expressions: None }
}

fn not_in(key: &str, value: &str) -> LabelSelector {
    let requirement = LabelSelectorRequirement { key: key.to_owned(), operator: "NotIn".to_owned(), values: Some(vec![value.to_owned()]) };
    LabelSelector { match_labels: None, match_expressions: Some(vec![requirement]) }
}
