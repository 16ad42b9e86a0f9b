//! Objects of which each is read for itself: what one box writes about itself must not keep the others' from being read.
//!
//! The API server lets more pass than we can read (of a time, say, `2026-01-01T00:00:00ZTx`, or a year that ends after ours), and in a list
//! one object that cannot be read makes the whole of it unreadable, at every attempt. `kube::core::DeserializeGuard` is the same idea, and
//! not enough here: it fails with the list if `metadata` is what cannot be read, and whoever may write an object may write times and trees
//! of any depth into `metadata.managedFields`.

use std::borrow::Cow;
use std::collections::BTreeSet;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// An object, or why it cannot be read.
#[derive(Clone, Debug)]
pub struct Guarded<K>(pub Result<K, Unreadable>);

/// What is known of an object that cannot be read.
#[derive(Clone, Debug)]
pub struct Unreadable {
    /// What the parser says.
    pub error: String,
    /// Its name, namespace, UID and version.
    pub metadata: ObjectMeta,
}

/// Which unreadable objects of a kind a log has named.
#[derive(Clone, Debug)]
pub struct Told {
    kind: &'static str,
    names: BTreeSet<String>,
}

impl Told {
    /// None yet.
    pub fn of(kind: &'static str) -> Self {
        Self { kind, names: BTreeSet::new() }
    }

    /// Forgets what is not there any more.
    pub fn forget(&mut self, name: &str) {
        self.names.remove(name);
    }

    /// Forgets all but these.
    pub fn keep<'a, K: Resource + 'a>(&mut self, there: impl Iterator<Item = &'a Guarded<K>>) {
        let there: BTreeSet<String> = there.map(|object| object.name_any()).collect();
        self.names.retain(|name| there.contains(name));
    }

    /// What to say of an object that cannot be read: once, until it can be read again.
    pub fn news<K: Resource>(&mut self, object: &Guarded<K>) -> Option<String> {
        let name = object.name_any();
        match &object.0 {
            Ok(_) => {
                self.names.remove(&name);
                None
            }
            Err(Unreadable { error, .. }) => self.names.insert(name.clone()).then(|| {
                let kind = self.kind;
                format!("{kind} {name} cannot be read and is left out: {error} (its node wrote that: see what became of it)")
            }),
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

/// From JSON text only, as the API server sends it: passing over an object's text knows no depth that is too deep.
impl<'de, K: DeserializeOwned> Deserialize<'de> for Guarded<K> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Box::<RawValue>::deserialize(deserializer)?;
        Ok(Self(serde_json::from_str(text.get()).map_err(|e| Unreadable { error: e.to_string(), metadata: metadata_of(text.get()) })))
    }
}

fn metadata_of(text: &str) -> ObjectMeta {
    let Names { name, namespace, uid, resource_version } = serde_json::from_str::<Named>(text).unwrap_or_default().metadata;
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

    // Each of them an API server of 1.37 takes and gives back (tried), from whoever may write the object.
    fn bad_ones() -> Vec<String> {
        let status =
            |status: &str| format!(r#"{{{HEAD},"metadata":{{"name":"bad","resourceVersion":"7"}},"spec":{{}},"status":{status}}}"#);
        let managed =
            |entry: &str| format!(r#"{{{HEAD},"metadata":{{"managedFields":[{entry}],"name":"bad","resourceVersion":"7"}},"spec":{{}}}}"#);
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
    fn one_that_cannot_be_read_is_named_and_the_others_are_read() {
        for bad in bad_ones() {
            let good = |name: &str| format!(r#"{{{HEAD},"metadata":{{"name":"{name}"}},"spec":{{"gateway":"g"}}}}"#);
            let list = format!(
                r#"{{"apiVersion":"v1","kind":"List","items":[{},{bad},{}],"metadata":{{"resourceVersion":"9"}}}}"#,
                good("a"),
                good("z")
            );
            let list: ObjectList<Guarded<GatewayNode>> = serde_json::from_str(&list).expect("a list");
            let read: Vec<(String, bool)> = list.iter().map(|o| (o.name_any(), o.0.is_ok())).collect();
            assert_eq!(read, [("a".to_owned(), true), ("bad".to_owned(), false), ("z".to_owned(), true)], "{:.300}", bad);

            let event: WatchEvent<Guarded<GatewayNode>> =
                serde_json::from_str(&format!(r#"{{"type":"MODIFIED","object":{bad}}}"#)).expect("an event");
            let WatchEvent::Modified(object) = event else { panic!("{event:?}") };
            assert_eq!((object.name_any(), object.resource_version()), ("bad".to_owned(), Some("7".to_owned())));
        }
    }

    #[test]
    fn other_kinds_have_their_times_too() {
        let late = r#"{"apiVersion":"v1","kind":"Node","metadata":{"name":"n"},"status":{"conditions":[{"type":"X","status":"True","lastHeartbeatTime":"9999-12-31T23:59:59Z"}]}}"#;
        let node: Guarded<Node> = serde_json::from_str(late).expect("never an error");
        assert_eq!((node.name_any(), node.0.is_err()), ("n".to_owned(), true));
        let words: Guarded<DynamicObject> = serde_json::from_str(&bad_ones()[0]).expect("never an error");
        assert!(words.0.is_ok(), "nobody has asked for its status yet");
    }
}
