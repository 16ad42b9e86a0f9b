//! Converts Gateways between v1alpha1 and v1beta1: pure functions, used by the conversion webhook.
//!
//! - To v1beta1: both replica counts are 1, endpoints are of type tunnel on port 4500.
//! - To v1alpha1: the first active endpoint becomes `activeEndpoint`.
//! - Fields that v1alpha1 lacks are stored in two annotations of the v1alpha1 object and restored by the conversion to
//!   v1beta1. A client of the old version that reads, modifies and writes an object therefore loses nothing. The API
//!   server converts the status back and forth when it updates a spec in the old version, so the status is preserved in
//!   the same manner.
//! - An object without the annotations (`kubectl replace` of a plain file) is converted from its v1alpha1 fields alone.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::DEFAULT_TUNNEL_PORT;
use crate::gateway::{self as v1beta1, EndpointType, ProxyConfig, TunnelConfig};
use crate::gateway_v1alpha1 as v1alpha1;

/// Annotation on a v1alpha1 Gateway: JSON of the v1beta1 spec's additional fields.
pub const ANNOTATION_SPEC: &str = "raven.openyurt.io/v1beta1-spec";
/// Annotation on a v1alpha1 Gateway: JSON of the v1beta1 status's additional fields.
pub const ANNOTATION_STATUS: &str = "raven.openyurt.io/v1beta1-status";

// Contains complete endpoints in their order: they identify the v1beta1 endpoint of each v1alpha1 endpoint.
#[derive(Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct KeptSpec {
    proxy_config: Option<ProxyConfig>,
    tunnel_config: Option<TunnelConfig>,
    #[serde(default)]
    encryption: v1beta1::Encryption,
    endpoints: Vec<v1beta1::Endpoint>,
}

// Without the nodes: both versions have them, and there may be thousands.
#[derive(Serialize, Deserialize, PartialEq)]
#[serde(rename_all = "camelCase")]
struct KeptStatus {
    active_endpoints: Vec<v1beta1::Endpoint>,
    #[serde(default)]
    exposed: bool,
    conditions: Vec<Condition>,
    observed_generation: Option<i64>,
}

/// Converts a Gateway to v1beta1.
pub fn to_v1beta1(old: v1alpha1::Gateway) -> v1beta1::Gateway {
    let mut metadata = old.metadata;
    let kept_spec = take::<KeptSpec>(&mut metadata, ANNOTATION_SPEC);
    let kept_status = take::<KeptStatus>(&mut metadata, ANNOTATION_STATUS);
    v1beta1::Gateway {
        metadata,
        spec: spec_to_v1beta1(old.spec, kept_spec),
        status: old.status.map(|s| status_to_v1beta1(s, kept_status)),
    }
}

/// Converts a Gateway to v1alpha1.
pub fn to_v1alpha1(new: v1beta1::Gateway) -> v1alpha1::Gateway {
    let mut metadata = new.metadata;
    let spec = spec_to_v1alpha1(&new.spec);
    // No annotation if the v1alpha1 fields alone convert back to the same spec.
    let plain = spec_to_v1beta1(spec.clone(), None) == new.spec;
    let kept = KeptSpec {
        proxy_config: new.spec.proxy_config,
        tunnel_config: new.spec.tunnel_config,
        encryption: new.spec.encryption,
        endpoints: new.spec.endpoints,
    };
    put(&mut metadata, ANNOTATION_SPEC, (!plain).then_some(&kept));

    let old_status = new.status.as_ref().map(status_to_v1alpha1);
    let plain = old_status.clone().map(|s| status_to_v1beta1(s, None)) == new.status;
    let kept = new.status.filter(|_| !plain).map(|s| KeptStatus {
        active_endpoints: s.active_endpoints,
        exposed: s.exposed,
        conditions: s.conditions,
        observed_generation: s.observed_generation,
    });
    put(&mut metadata, ANNOTATION_STATUS, kept.as_ref());
    v1alpha1::Gateway { metadata, spec, status: old_status }
}

fn spec_to_v1beta1(old: v1alpha1::GatewaySpec, kept: Option<KeptSpec>) -> v1beta1::GatewaySpec {
    let spec = v1beta1::GatewaySpec {
        node_selector: old.node_selector,
        expose_type: old.expose_type,
        ..v1beta1::GatewaySpec::default()
    };
    match kept {
        Some(kept) => v1beta1::GatewaySpec {
            proxy_config: kept.proxy_config,
            tunnel_config: kept.tunnel_config,
            encryption: kept.encryption,
            endpoints: match_endpoints(old.endpoints, kept.endpoints),
            ..spec
        },
        None => v1beta1::GatewaySpec {
            proxy_config: Some(ProxyConfig::default()),
            tunnel_config: Some(TunnelConfig::default()),
            endpoints: old.endpoints.into_iter().map(endpoint_to_v1beta1).collect(),
            ..spec
        },
    }
}

fn spec_to_v1alpha1(new: &v1beta1::GatewaySpec) -> v1alpha1::GatewaySpec {
    v1alpha1::GatewaySpec {
        node_selector: new.node_selector.clone(),
        expose_type: new.expose_type,
        endpoints: new.endpoints.iter().map(endpoint_to_v1alpha1).collect(),
    }
}

fn status_to_v1beta1(old: v1alpha1::GatewayStatus, kept: Option<KeptStatus>) -> v1beta1::GatewayStatus {
    let node_count = i32::try_from(old.nodes.len()).unwrap_or(i32::MAX);
    let elected_by_old = old.active_endpoint.clone().into_iter().map(endpoint_to_v1beta1).collect();
    let Some(kept) = kept else {
        return v1beta1::GatewayStatus {
            nodes: old.nodes,
            node_count,
            active_endpoints: elected_by_old,
            ..v1beta1::GatewayStatus::default()
        };
    };
    // If a controller of the old version elected a different endpoint, the stored list is stale.
    let is_current = kept.active_endpoints.first().map(endpoint_to_v1alpha1) == old.active_endpoint;
    v1beta1::GatewayStatus {
        nodes: old.nodes,
        node_count,
        active_endpoints: if is_current { kept.active_endpoints } else { elected_by_old },
        exposed: kept.exposed,
        conditions: kept.conditions,
        observed_generation: kept.observed_generation,
    }
}

fn status_to_v1alpha1(new: &v1beta1::GatewayStatus) -> v1alpha1::GatewayStatus {
    v1alpha1::GatewayStatus {
        nodes: new.nodes.clone(),
        active_endpoint: new.active_endpoints.first().map(endpoint_to_v1alpha1),
    }
}

fn endpoint_to_v1beta1(old: v1alpha1::Endpoint) -> v1beta1::Endpoint {
    v1beta1::Endpoint {
        type_: EndpointType::Tunnel,
        port: Some(DEFAULT_TUNNEL_PORT.into()),
        ..overlaid(v1beta1::Endpoint::default(), old)
    }
}

fn endpoint_to_v1alpha1(new: &v1beta1::Endpoint) -> v1alpha1::Endpoint {
    v1alpha1::Endpoint {
        node_name: new.node_name.clone(),
        under_nat: new.under_nat,
        public_ip: new.public_ip.clone(),
        config: new.config.clone(),
    }
}

fn overlaid(below: v1beta1::Endpoint, old: v1alpha1::Endpoint) -> v1beta1::Endpoint {
    v1beta1::Endpoint {
        node_name: old.node_name,
        under_nat: old.under_nat,
        public_ip: old.public_ip,
        config: old.config,
        ..below
    }
}

// Merges each v1alpha1 endpoint into its stored v1beta1 endpoint. Unchanged endpoints are matched first, so that an
// untouched list is restored exactly, even if it names a node twice; then the rest by node name. An endpoint without a
// match is new.
fn match_endpoints(old: Vec<v1alpha1::Endpoint>, kept: Vec<v1beta1::Endpoint>) -> Vec<v1beta1::Endpoint> {
    let mut free: Vec<Option<v1beta1::Endpoint>> = kept.into_iter().map(Some).collect();
    let mut take_first = |matches: &dyn Fn(&v1beta1::Endpoint) -> bool| {
        free.iter_mut().find(|slot| slot.as_ref().is_some_and(matches)).and_then(Option::take)
    };
    let unchanged: Vec<Option<v1beta1::Endpoint>> =
        old.iter().map(|e| take_first(&|kept| endpoint_to_v1alpha1(kept) == *e)).collect();
    let pairs = old.into_iter().zip(unchanged);
    pairs
        .map(|(endpoint, unchanged)| {
            match unchanged.or_else(|| take_first(&|kept| kept.node_name == endpoint.node_name)) {
                Some(kept) => overlaid(kept, endpoint),
                None => endpoint_to_v1beta1(endpoint),
            }
        })
        .collect()
}

// Malformed JSON (the annotation was edited) counts as absent: if the conversion failed, the object could not
// even be read.
fn take<T: DeserializeOwned>(metadata: &mut ObjectMeta, key: &str) -> Option<T> {
    let annotations = metadata.annotations.as_mut()?;
    let text = annotations.remove(key)?;
    if annotations.is_empty() {
        metadata.annotations = None;
    }
    serde_json::from_str(&text).ok()
}

fn put<T: Serialize>(metadata: &mut ObjectMeta, key: &str, kept: Option<&T>) {
    if let Some(annotations) = metadata.annotations.as_mut() {
        annotations.remove(key);
    }
    if let Some(kept) = kept {
        let text = serde_json::to_string(kept).expect("strings, numbers and maps with string keys are valid JSON");
        metadata.annotations.get_or_insert_with(BTreeMap::new).insert(key.to_owned(), text);
    }
}

#[cfg(test)]
mod tests;
