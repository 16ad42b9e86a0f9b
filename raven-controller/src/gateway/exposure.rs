//! Which Gateways are exposed: gateway nodes of other pools dial them, and they relay.
//!
//! `exposeType` says so. Gateways of OpenYurt's v1alpha1 do not have it: there, every Gateway that is not behind NAT is
//! dialled and may relay. In a cluster where no person has set `exposeType`, the Gateways of the cloud whose endpoints are
//! not `underNAT` are exposed. Those of edge nodes are not: `underNAT` may be missing only because nobody needed it.

use std::collections::BTreeSet;

use super::facts::{GatewayFacts, GatewayName, NodeName};
use super::inputs::Inputs;

/// Returns the names of the exposed Gateways.
pub(crate) fn exposed(inputs: &Inputs) -> BTreeSet<GatewayName> {
    let mut exposed = declared(inputs, |_| true);
    if declared(inputs, |gateway| !inputs.is_ruled(gateway)).is_empty() {
        let in_cloud = inputs.gateways.values().filter(|g| !inputs.is_ruled(g) && is_in_cloud(inputs, g));
        exposed.extend(in_cloud.map(|gateway| gateway.name.clone()));
    }
    exposed
}

fn declared(inputs: &Inputs, wanted: impl Fn(&GatewayFacts) -> bool) -> BTreeSet<GatewayName> {
    let declared = |gateway: &GatewayFacts| !gateway.resource.spec.expose_type.is_edge() && wanted(gateway);
    inputs.gateways.values().filter(|gateway| declared(gateway)).map(|gateway| gateway.name.clone()).collect()
}

fn is_in_cloud(inputs: &Inputs, gateway: &GatewayFacts) -> bool {
    let endpoints = &gateway.resource.spec.endpoints;
    let mut nodes = endpoints.iter().filter_map(|e| inputs.nodes.get(&NodeName::from(e.node_name.as_str()))).peekable();
    nodes.peek().is_some() && nodes.all(|node| !node.is_edge()) && endpoints.iter().all(|e| !e.under_nat)
}
