//! Answers ConversionReviews (`apiextensions.k8s.io/v1`) for Gateways. No I/O.

use kube::core::Status;
use kube::core::conversion::{ConversionRequest, ConversionResponse, ConversionReview};
use raven_api::conversion::{to_v1alpha1, to_v1beta1};
use raven_api::{GROUP, gateway, gateway_v1alpha1};
use serde::Serialize;
use serde_json::Value;

/// The request body is not a ConversionReview.
#[derive(Debug, thiserror::Error)]
#[error("the body is not a ConversionReview of apiextensions.k8s.io/v1 with a request: {0}")]
pub struct InvalidReview(String);

/// An object of the request cannot be converted.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error(
        "cannot convert {kind} {name} of {version} to {desired}: the webhook converts Gateways between {GROUP}/v1alpha1 and {GROUP}/v1beta1"
    )]
    Unknown { kind: String, name: String, version: String, desired: String },
    #[error("cannot convert Gateway {name} of {version}: {source}")]
    Malformed { name: String, version: String, source: serde_json::Error },
}

/// Returns the response to a ConversionReview in JSON.
///
/// # Errors
/// If the body is not a ConversionReview with a request.
pub fn answer(body: &[u8]) -> Result<ConversionReview, InvalidReview> {
    let review: ConversionReview = serde_json::from_slice(body).map_err(|e| InvalidReview(e.to_string()))?;
    let request = ConversionRequest::from_review(review).map_err(|e| InvalidReview(e.to_string()))?;
    let desired = request.desired_api_version.clone();
    let mut request = request;
    let objects = std::mem::take(&mut request.objects);
    let response = ConversionResponse::for_request(request);
    // All or nothing: the API server rejects a response with fewer objects.
    let converted: Result<Vec<Value>, Error> = objects.into_iter().map(|object| convert(object, &desired)).collect();
    let response = match converted {
        Ok(objects) => response.success(objects),
        Err(e) => {
            tracing::warn!(error = %e, "conversion failed");
            response.failure(Status::failure(&e.to_string(), "Invalid"))
        }
    };
    Ok(response.into_review())
}

fn convert(object: Value, desired: &str) -> Result<Value, Error> {
    let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (kind, name, version) = (text("/kind"), text("/metadata/name"), text("/apiVersion"));
    let ours = |version: &str| version.strip_prefix(GROUP).and_then(|rest| rest.strip_prefix('/')).map(str::to_owned);
    let (from, to) = (ours(&version), ours(desired));
    if kind != "Gateway" {
        return Err(Error::Unknown { kind, name, version, desired: desired.to_owned() });
    }
    let malformed = |source| Error::Malformed { name: name.clone(), version: version.clone(), source };
    match (from.as_deref(), to.as_deref()) {
        (Some("v1alpha1"), Some("v1beta1")) => {
            match serde_json::from_value::<gateway_v1alpha1::Gateway>(object.clone()) {
                Ok(old) => json(&to_v1beta1(old)).map_err(malformed),
                Err(e) => Ok(passed_on(object, &name, desired, &e)),
            }
        }
        (Some("v1beta1"), Some("v1alpha1")) => match serde_json::from_value::<gateway::Gateway>(object.clone()) {
            Ok(new) => json(&to_v1alpha1(new)).map_err(malformed),
            Err(e) => Ok(passed_on(object, &name, desired, &e)),
        },
        (Some("v1alpha1" | "v1beta1"), Some(_)) if from == to => Ok(object),
        _ => Err(Error::Unknown { kind, name, version, desired: desired.to_owned() }),
    }
}

// One object that cannot be converted would make the lists of all Gateways fail. What both versions have in common is kept;
// the reader reports the defect.
fn passed_on(mut object: Value, name: &str, desired: &str, error: &serde_json::Error) -> Value {
    tracing::warn!(gateway = name, %error, desired, "Gateway is unreadable; it is passed on without a conversion");
    object["apiVersion"] = Value::from(desired);
    object
}

fn json(object: &impl Serialize) -> Result<Value, serde_json::Error> {
    serde_json::to_value(object)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn review(desired: &str, objects: Value) -> Value {
        let body = json!({
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "ConversionReview",
            "request": {"uid": "705ab4f5", "desiredAPIVersion": desired, "objects": objects},
        });
        let answer = answer(body.to_string().as_bytes()).expect("a ConversionReview");
        serde_json::to_value(answer).expect("a response is JSON")
    }

    fn old() -> Value {
        json!({"apiVersion": "raven.openyurt.io/v1alpha1", "kind": "Gateway", "metadata": {"name": "g", "uid": "u"}, "spec": {"endpoints": [{"nodeName": "n"}]}})
    }

    #[test]
    fn response_has_the_uid_and_all_objects_in_order() {
        let mut second = old();
        second["metadata"]["name"] = json!("h");
        let answer = review("raven.openyurt.io/v1beta1", json!([old(), second]));
        assert_eq!((&answer["kind"], &answer["response"]["uid"]), (&json!("ConversionReview"), &json!("705ab4f5")));
        assert_eq!(answer["response"]["result"]["status"], json!("Success"));
        let converted = answer["response"]["convertedObjects"].as_array().expect("a list");
        assert_eq!(converted.len(), 2);
        assert_eq!(
            (&converted[0]["apiVersion"], &converted[1]["metadata"]["name"]),
            (&json!("raven.openyurt.io/v1beta1"), &json!("h"))
        );
        assert_eq!(converted[0]["spec"]["endpoints"][0]["type"], json!("tunnel"));
    }

    #[test]
    fn object_of_the_desired_version_is_unchanged() {
        let mut odd = old();
        odd["spec"]["unheardOf"] = json!(1);
        assert_eq!(review("raven.openyurt.io/v1alpha1", json!([odd]))["response"]["convertedObjects"][0], odd);
    }

    #[test]
    fn unreadable_object_does_not_affect_the_others() {
        let versions = ["raven.openyurt.io/v1alpha1", "raven.openyurt.io/v1beta1"];
        for (from, to) in [(versions[0], versions[1]), (versions[1], versions[0])] {
            let (mut good, mut bad) = (old(), old());
            bad["spec"]["endpoints"] = json!("none");
            (good["apiVersion"], bad["apiVersion"]) = (json!(from), json!(from));
            let answer = review(to, json!([bad, good]));
            assert_eq!(answer["response"]["result"]["status"], json!("Success"));
            let converted = &answer["response"]["convertedObjects"];
            bad["apiVersion"] = json!(to);
            assert_eq!(converted[0], bad);
            assert_eq!(
                (&converted[1]["apiVersion"], &converted[1]["spec"]["endpoints"][0]["nodeName"]),
                (&json!(to), &json!("n"))
            );
        }
    }

    #[test]
    fn foreign_object_fails_the_request_and_is_named() {
        let foreign =
            json!({"apiVersion": "raven.openyurt.io/v1beta1", "kind": "GatewayNode", "metadata": {"name": "x"}});
        let answer = review("raven.openyurt.io/v1alpha1", json!([old(), foreign]));
        assert_eq!(answer["response"]["result"]["status"], json!("Failure"));
        let message = answer["response"]["result"]["message"].as_str().unwrap_or_default();
        assert!(message.contains("GatewayNode x"), "{message}");
        let unknown = review("raven.openyurt.io/v2", json!([old()]));
        assert_eq!(unknown["response"]["result"]["status"], json!("Failure"));
    }

    #[test]
    fn malformed_body_is_rejected() {
        for body in ["", "{}", r#"{"apiVersion":"apiextensions.k8s.io/v1","kind":"ConversionReview"}"#, "[1]"] {
            assert!(answer(body.as_bytes()).is_err(), "{body}");
        }
    }
}
