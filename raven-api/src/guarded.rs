//! Objects that are parsed one by one, so that an unreadable object does not make the whole list unreadable.
//!
//! The API server accepts values that our parsers reject, for example the time `2026-01-01T00:00:00ZTx` or a year
//! beyond our range. In a plain list one such object fails the whole list at every attempt.
//! `kube::core::DeserializeGuard` does not suffice: it still fails if `metadata` is unreadable, and every writer of an
//! object can put arbitrary times and deeply nested trees into `metadata.managedFields`.

use std::borrow::Cow;
use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// An object, or the reason why it is unreadable.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Unreadable>);

/// An object that could not be parsed.
#[derive(Clone, Debug)]
pub struct Unreadable {
    /// The field, and the message of the parser.
    pub error: String,
    /// Name, namespace, UID and resource version, as far as they are readable.
    pub metadata: ObjectMeta,
}

/// Records which unreadable objects of a kind were reported, so that each is logged once until it is readable again.
#[derive(Clone, Debug)]
pub struct UnreadableLog {
    kind: &'static str,
    advice: &'static str,
    names: BTreeSet<String>,
}

impl UnreadableLog {
    /// Creates an empty log for objects of `kind`, which a node writes about itself. An unreadable one counts as absent.
    pub fn new(kind: &'static str) -> Self {
        Self { kind, advice: "it is ignored; inspect the node that wrote it", names: BTreeSet::new() }
    }

    /// Creates an empty log for Gateways. The last known version of an unreadable one stays in use.
    pub fn of_gateways() -> Self {
        let advice = "its last known version, if any, stays in use (correct it with kubectl edit gateway)";
        Self { kind: "Gateway", advice, names: BTreeSet::new() }
    }

    /// Kind of the objects.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What becomes of an unreadable object, and what to do.
    pub fn advice(&self) -> &'static str {
        self.advice
    }

    /// Forgets a deleted object.
    pub fn forget(&mut self, name: &str) {
        self.names.remove(name);
    }

    /// Forgets all objects but those of the current list.
    pub fn retain<'a, K: Resource + 'a>(&mut self, current: impl Iterator<Item = &'a Guarded<K>>) {
        let current: BTreeSet<String> = current.map(kube::ResourceExt::name_any).collect();
        self.names.retain(|name| current.contains(name));
    }

    /// Returns the parser's message if the object is unreadable and was not reported since it was last readable.
    pub fn first_failure<'a, K: Resource>(&mut self, object: &'a Guarded<K>) -> Option<&'a str> {
        let name = object.name_any();
        match &object.0 {
            Ok(_) => {
                self.names.remove(&name);
                None
            }
            Err(Unreadable { error, .. }) => self.names.insert(name).then_some(error.as_str()),
        }
    }
}

#[derive(Default, Deserialize)]
struct Named {
    metadata: Names,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Names {
    name: Option<String>,
    namespace: Option<String>,
    uid: Option<String>,
    resource_version: Option<String>,
}

/// Works for JSON text only, the format of the API server. Skipping an object's text has no limit on nesting depth,
/// unlike parsing it.
impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        let parsed = serde_json::from_str(text.get());
        Ok(Self(parsed.map_err(|e| Unreadable {
            error: located::<K>(text.get()).unwrap_or_else(|| e.to_string()),
            metadata: metadata_of(text.get()),
        })))
    }
}

/// Parses again, and names the field instead of its line and column, which no reader of the object sees.
fn located<K: DeserializeOwned>(text: &str) -> Option<String> {
    let failure = serde_path_to_error::deserialize::<_, K>(&mut serde_json::Deserializer::from_str(text)).err()?;
    let message = failure.inner().to_string();
    let message = message.split_once(" at line ").map_or(message.as_str(), |(message, _)| message);
    Some(match failure.path().to_string().as_str() {
        "." => message.to_owned(),
        path => format!("{path}: {message}"),
    })
}

fn metadata_of(text: &str) -> ObjectMeta {
    let Names { name, namespace, uid, resource_version } =
        serde_json::from_str::<Named>(text).unwrap_or_default().metadata;
    ObjectMeta { name, namespace, uid, resource_version, ..ObjectMeta::default() }
}

impl<K: Resource> Resource for Guarded<K> {
    type DynamicType = K::DynamicType;
    type Scope = K::Scope;

    fn kind(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::kind(dt)
    }

    fn group(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::group(dt)
    }

    fn version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::version(dt)
    }

    fn api_version(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::api_version(dt)
    }

    fn plural(dt: &Self::DynamicType) -> Cow<'_, str> {
        K::plural(dt)
    }

    fn meta(&self) -> &ObjectMeta {
        self.0.as_ref().map_or_else(|unreadable| &unreadable.metadata, K::meta)
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        self.0.as_mut().map_or_else(|unreadable| &mut unreadable.metadata, K::meta_mut)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Node;
    use kube::core::{DynamicObject, ObjectList, WatchEvent};

    use super::*;
    use crate::GatewayNode;

    const HEAD: &str = r#""apiVersion":"raven.openyurt.io/v1beta1","kind":"GatewayNode""#;

    // An API server of version 1.37 accepts and returns each of these.
    fn bad_ones() -> Vec<String> {
        let status = |status: &str| {
            format!(r#"{{{HEAD},"metadata":{{"name":"bad","resourceVersion":"7"}},"spec":{{}},"status":{status}}}"#)
        };
        let managed = |entry: &str| {
            format!(
                r#"{{{HEAD},"metadata":{{"managedFields":[{entry}],"name":"bad","resourceVersion":"7"}},"spec":{{}}}}"#
            )
        };
        let deep = format!("{}{{}}{}", r#"{"f:a":"#.repeat(9000), "}".repeat(9000));
        vec![
            status(r#"{"peers":[{"nodeName":"y","gateway":"y","lastHandshake":"2026-01-01T00:00:00+99:99"}]}"#),
            status(
                r#"{"conditions":[{"type":"Ready","status":"True","reason":"x","message":"","lastTransitionTime":"2026-01-01T00:00:00ZTx"}]}"#,
            ),
            managed(r#"{"manager":"x","operation":"Update","time":"9999-12-31T23:59:59Z"}"#),
            managed(&format!(r#"{{"manager":"x","operation":"Update","fieldsType":"FieldsV1","fieldsV1":{deep}}}"#)),
        ]
    }

    #[test]
    fn unreadable_object_does_not_affect_the_rest_of_the_list() {
        for bad in bad_ones() {
            let good = |name: &str| format!(r#"{{{HEAD},"metadata":{{"name":"{name}"}},"spec":{{"gateway":"g"}}}}"#);
            let list = format!(
                r#"{{"apiVersion":"v1","kind":"List","items":[{},{bad},{}],"metadata":{{"resourceVersion":"9"}}}}"#,
                good("a"),
                good("z")
            );
            let list: ObjectList<Guarded<GatewayNode>> = serde_json::from_str(&list).expect("a list");
            let read: Vec<(String, bool)> = list.iter().map(|o| (o.name_any(), o.0.is_ok())).collect();
            assert_eq!(read, [("a".to_owned(), true), ("bad".to_owned(), false), ("z".to_owned(), true)], "{bad:.300}");

            let event: WatchEvent<Guarded<GatewayNode>> =
                serde_json::from_str(&format!(r#"{{"type":"MODIFIED","object":{bad}}}"#)).expect("an event");
            let WatchEvent::Modified(object) = event else { panic!("{event:?}") };
            assert_eq!((object.name_any(), object.resource_version()), ("bad".to_owned(), Some("7".to_owned())));
        }
    }

    #[test]
    fn error_names_the_field() {
        let gateway =
            r#"{"metadata":{"name":"g"},"spec":{"endpoints":[{"nodeName":"a"},{"nodeName":"b","type":"Tunnel"}]}}"#;
        let read: Guarded<crate::Gateway> = serde_json::from_str(gateway).expect("never an error");
        let Unreadable { error, .. } = read.0.expect_err("there is no type Tunnel");
        assert_eq!(error, "spec.endpoints[1].type: unknown variant `Tunnel`, expected `tunnel` or `proxy`");
        let empty: Guarded<crate::Gateway> =
            serde_json::from_str(r#"{"metadata":{"name":"g"}}"#).expect("never an error");
        assert_eq!(empty.0.expect_err("there is no spec").error, "missing field `spec`");
    }

    #[test]
    fn nodes_and_dynamic_objects_are_guarded_too() {
        let late = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"},"status":{"conditions":[{"type":"X","status":"True","lastHeartbeatTime":"9999-12-31T23:59:59Z"}]}}"#;
        let node: Guarded<Node> = serde_json::from_str(late).expect("never an error");
        assert_eq!((node.name_any(), node.0.is_err()), ("n".to_owned(), true));
        let words: Guarded<DynamicObject> = serde_json::from_str(&bad_ones()[0]).expect("never an error");
        assert!(words.0.is_ok(), "a DynamicObject does not parse the status");
    }
}
