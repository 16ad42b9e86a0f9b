//! The three pool rules, for nodes that no label and no selector assigns to a Gateway.
//!
//! 1. If a NodePool exists, its nodes are one pool. (Of an edge NodePool with `interConnectivity: false`, each node is a
//!    pool: its nodes do not reach each other.)
//! 2. If the cloud side has no NodePool, all cloud nodes are one pool.
//! 3. If the edge side has no NodePool, every edge node is a pool of its own.
//!
//! A rule creates a Gateway and never updates its spec, so endpoints and addresses that a user adds are preserved.
//! The controller deletes the Gateway when no node is left for it. While the Gateway has the label
//! [`LABEL_MANAGED_BY`], the rule determines its nodes. Its nodeSelector matches the same nodes and takes effect when
//! a user removes the label or sets another nodeSelector.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, LabelSelectorRequirement, ObjectMeta};
use raven_api::gateway::{ExposeType, Gateway, GatewaySpec};
use raven_api::names::{LABEL_EDGE_WORKER, LABEL_MANAGED_BY, LABEL_NODE_POOL, LABEL_NODE_POOL_OLD, MANAGER_CONTROLLER};

use super::facts::{GatewayName, NodeFacts, NodeName, PoolFacts};
use super::inputs::Inputs;
use super::membership::Membership;

const LABEL_HOSTNAME: &str = "kubernetes.io/hostname";

/// A rule that requires a Gateway. One value per Gateway.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rule {
    NodePool(String),
    Cloud,
    EdgeNode(NodeName),
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NodePool(pool) => write!(f, "'NodePool {pool}'"),
            Self::Cloud => f.write_str("'all cloud nodes'"),
            Self::EdgeNode(node) => write!(f, "'edge node {node}'"),
        }
    }
}

/// Applies the rules to `free`, the nodes that no Gateway claims. A Gateway that cannot be parsed and has no known version
/// may claim any of them, so nothing is created or deleted then.
pub(super) fn apply(inputs: &Inputs, free: &[&NodeFacts], membership: &mut Membership) {
    let all_known = inputs.unreadable.keys().all(|name| inputs.gateways.contains_key(name));
    let mut required: BTreeMap<Rule, Vec<&NodeFacts>> = BTreeMap::new();
    for node in free {
        match rule_for(inputs, node) {
            Ok(rule) => required.entry(rule).or_default().push(node),
            Err(stray) => membership.strays.push(stray),
        }
    }
    let mut kept = BTreeSet::new();
    for (rule, nodes) in &required {
        let Some(name) = name_for(inputs, rule) else {
            membership.strays.push(format!(
                "nodes of rule {rule} have no pool: both possible names are used by Gateways that users wrote; rename one of them"
            ));
            continue;
        };
        if inputs.gateways.contains_key(&name) {
            nodes.iter().for_each(|node| membership.add(&name, &node.name));
        } else if all_known {
            membership.create.push(gateway_for(inputs, rule, &name, nodes));
        }
        kept.insert(name);
    }
    // A Gateway that has nodes by their labels is in use and stays.
    let stale =
        inputs.gateways.values().filter(|g| g.generated && !kept.contains(&g.name) && !membership.has_nodes(&g.name));
    let readable = stale.filter(|g| all_known && !inputs.unreadable.contains_key(&g.name));
    membership.delete = readable.map(|g| g.name.clone()).collect();
}

fn rule_for(inputs: &Inputs, node: &NodeFacts) -> Result<Rule, String> {
    if let Some(pool) = pool_of(inputs, node) {
        let separate = pool.separate && node.is_edge();
        return Ok(if separate { Rule::EdgeNode(node.name.clone()) } else { Rule::NodePool(pool.name.clone()) });
    }
    let edge = node.is_edge();
    if inputs.pools.values().any(|pool| pool.edge == edge) {
        let side = if edge { "edge" } else { "cloud" };
        return Err(format!(
            "{side} node {} belongs to no pool: NodePools exist on the {side} side, and none of them contains it; label it {LABEL_NODE_POOL}=<name>, or select it by a Gateway",
            node.name
        ));
    }
    Ok(if edge { Rule::EdgeNode(node.name.clone()) } else { Rule::Cloud })
}

fn pool_of<'a>(inputs: &'a Inputs, node: &NodeFacts) -> Option<&'a PoolFacts> {
    let mut labelled = [LABEL_NODE_POOL, LABEL_NODE_POOL_OLD].into_iter().filter_map(|key| node.label(key));
    let listed = || inputs.pools.values().find(|pool| pool.nodes.contains(&node.name));
    labelled.find_map(|name| inputs.pools.get(name)).or_else(listed).map(AsRef::as_ref)
}

// A Gateway of the same name that a user wrote is left alone: the rule then uses a second name.
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
        // No endpoints: every ready node is a candidate, and peers dial its InternalIP until a user sets publicIP.
        Rule::Cloud => (true, not_in(LABEL_EDGE_WORKER, "true")),
        Rule::EdgeNode(node) => {
            // Usually the node's name, but the kubelet can override it.
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
    let requirement = LabelSelectorRequirement {
        key: key.to_owned(),
        operator: "NotIn".to_owned(),
        values: Some(vec![value.to_owned()]),
    };
    LabelSelector { match_labels: None, match_expressions: Some(vec![requirement]) }
}
