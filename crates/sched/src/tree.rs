//! The run queue's order: a red-black tree whose nodes carry the *RB index*.
//!
//! Thesis, section 4.4.2: the RB index of a node is the number of nodes in its left subtree. It is
//! kept through insertion, removal and rotation, each at the cost of the path that the plain tree
//! walks anyway, and it makes the *scheduling ordinate* (how many tasks stand before one) a walk
//! from the node to the root, O(log n), instead of a walk over the queue.

use std::fmt::Debug;

/// A place in a tree; valid from [`RbTree::insert`] until [`RbTree::remove`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Node(u32);

/// The nil of the tree: index 0, black, its parent is written while a removal mends the tree.
const NIL: u32 = 0;

#[derive(Debug, Clone)]
struct Slot<K> {
    key: K,
    parent: u32,
    left: u32,
    right: u32,
    /// The RB index: nodes in the left subtree.
    index: u32,
    red: bool,
    used: bool,
}

/// A red-black tree of keys that are compared as a whole; equal keys stand in the order of their
/// insertion. At most 2^32 - 2 nodes.
#[derive(Debug, Clone)]
pub struct RbTree<K> {
    slots: Vec<Slot<K>>,
    free: Vec<u32>,
    root: u32,
    /// The leftmost node, as Linux caches it.
    first: u32,
}

impl<K: Ord + Copy + Default> Default for RbTree<K> {
    fn default() -> Self {
        Self::new()
    }
}

impl<K: Ord + Copy + Default> RbTree<K> {
    /// An empty tree.
    #[must_use]
    pub fn new() -> Self {
        let nil = Slot {
            key: K::default(),
            parent: NIL,
            left: NIL,
            right: NIL,
            index: 0,
            red: false,
            used: false,
        };
        Self { slots: vec![nil], free: Vec::new(), root: NIL, first: NIL }
    }

    /// Nodes in the tree.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - 1 - self.free.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.root == NIL
    }

    /// The key at `node`.
    ///
    /// # Panics
    /// When the node has been removed.
    #[must_use]
    pub fn key(&self, node: Node) -> K {
        self.check(node);
        self.at(node.0).key
    }

    /// The node with the smallest key.
    #[must_use]
    pub fn first(&self) -> Option<Node> {
        (self.first != NIL).then_some(Node(self.first))
    }

    /// The node behind `node`.
    ///
    /// # Panics
    /// When the node has been removed.
    #[must_use]
    pub fn next(&self, node: Node) -> Option<Node> {
        self.check(node);
        let next = self.successor(node.0);
        (next != NIL).then_some(Node(next))
    }

    /// All nodes in order.
    pub fn iter(&self) -> impl Iterator<Item = (Node, K)> + '_ {
        std::iter::successors(self.first(), |n| self.next(*n)).map(|n| (n, self.key(n)))
    }

    /// The scheduling ordinate of `node`: how many nodes stand before it. O(log n); Algorithm 2,
    /// `SCHED_ORDINATE` (lines 18 to 29).
    ///
    /// # Panics
    /// When the node has been removed.
    #[must_use]
    pub fn ordinate(&self, node: Node) -> usize {
        self.check(node);
        let mut a = node.0;
        let mut parent = self.at(a).parent; // line 19
        let mut n = self.at(a).index; // line 20
        while parent != NIL {
            // line 21
            if self.at(parent).right == a {
                n += self.at(parent).index + 1; // line 23
            }
            a = parent; // lines 25, 26
            parent = self.at(a).parent;
        }
        n as usize
    }

    /// The node that has `ordinate` nodes before it; O(log n) by the RB index.
    #[must_use]
    pub fn select(&self, mut ordinate: usize) -> Option<Node> {
        let mut n = self.root;
        while n != NIL {
            let index = self.at(n).index as usize;
            match ordinate.cmp(&index) {
                std::cmp::Ordering::Less => n = self.at(n).left,
                std::cmp::Ordering::Equal => return Some(Node(n)),
                std::cmp::Ordering::Greater => {
                    ordinate -= index + 1;
                    n = self.at(n).right;
                }
            }
        }
        None
    }

    /// The ordinate by walking the queue from its front: what a scheduler without the RB index has
    /// to do. O(n); here to be compared with.
    ///
    /// # Panics
    /// When the node has been removed.
    #[must_use]
    pub fn ordinate_by_walk(&self, node: Node) -> usize {
        self.check(node);
        std::iter::successors(self.first(), |n| self.next(*n)).take_while(|n| *n != node).count()
    }

    /// Puts `key` behind all keys that are not greater.
    pub fn insert(&mut self, key: K) -> Node {
        let (mut parent, mut child, mut leftmost) = (NIL, self.root, true);
        while child != NIL {
            parent = child;
            if key < self.at(child).key {
                self.at_mut(child).index += 1;
                child = self.at(child).left;
            } else {
                leftmost = false;
                child = self.at(child).right;
            }
        }
        let new = Slot { key, parent, left: NIL, right: NIL, index: 0, red: true, used: true };
        let node = match self.free.pop() {
            Some(n) => {
                *self.at_mut(n) = new;
                n
            }
            None => {
                self.slots.push(new);
                (self.slots.len() - 1) as u32
            }
        };
        if leftmost {
            self.first = node;
        }
        if parent == NIL {
            self.root = node;
        } else if key < self.at(parent).key {
            self.at_mut(parent).left = node;
        } else {
            self.at_mut(parent).right = node;
        }
        self.mend_insertion(node);
        Node(node)
    }

    /// Takes `node` out and gives its key.
    ///
    /// # Panics
    /// When the node has been removed before.
    pub fn remove(&mut self, node: Node) -> K {
        self.check(node);
        let z = node.0;
        if self.first == z {
            self.first = self.successor(z);
        }
        // The node that leaves its place: z itself, or its successor, which then takes z's.
        let (l, r) = (self.at(z).left, self.at(z).right);
        let y = if l == NIL || r == NIL { z } else { self.minimum(r) };
        self.count_out(y);
        let was_red = self.at(y).red;
        let x;
        if y == z {
            x = if l == NIL { r } else { l };
            self.transplant(z, x);
        } else {
            x = self.at(y).right;
            if self.at(y).parent == z {
                self.at_mut(x).parent = y;
            } else {
                self.transplant(y, x);
                let right = self.at(z).right;
                self.at_mut(y).right = right;
                self.at_mut(right).parent = y;
            }
            self.transplant(z, y);
            let (left, index, red) = (self.at(z).left, self.at(z).index, self.at(z).red);
            let moved = self.at_mut(y);
            (moved.left, moved.index, moved.red) = (left, index, red);
            self.at_mut(left).parent = y;
        }
        if !was_red {
            self.mend_removal(x);
        }
        *self.at_mut(NIL) = Slot { parent: NIL, red: false, ..self.at(NIL).clone() };
        self.at_mut(z).used = false;
        self.free.push(z);
        self.at(z).key
    }

    /// Gives `node` another key: taken out and put in again, as Linux repositions an entity.
    ///
    /// # Panics
    /// When the node has been removed.
    pub fn reposition(&mut self, node: Node, key: K) -> Node {
        self.remove(node);
        self.insert(key)
    }

    fn check(&self, node: Node) {
        assert!(self.at(node.0).used, "the node was removed");
    }

    fn at(&self, n: u32) -> &Slot<K> {
        &self.slots[n as usize]
    }

    fn at_mut(&mut self, n: u32) -> &mut Slot<K> {
        &mut self.slots[n as usize]
    }

    fn minimum(&self, mut n: u32) -> u32 {
        while self.at(n).left != NIL {
            n = self.at(n).left;
        }
        n
    }

    fn successor(&self, n: u32) -> u32 {
        if self.at(n).right != NIL {
            return self.minimum(self.at(n).right);
        }
        let (mut child, mut parent) = (n, self.at(n).parent);
        while parent != NIL && self.at(parent).right == child {
            child = parent;
            parent = self.at(parent).parent;
        }
        parent
    }

    /// Every node that has `n` in its left subtree counts one less.
    fn count_out(&mut self, n: u32) {
        let (mut child, mut parent) = (n, self.at(n).parent);
        while parent != NIL {
            if self.at(parent).left == child {
                self.at_mut(parent).index -= 1;
            }
            child = parent;
            parent = self.at(parent).parent;
        }
    }

    /// Puts the subtree `new` in the place of `old`.
    fn transplant(&mut self, old: u32, new: u32) {
        let parent = self.at(old).parent;
        self.replace_child(parent, old, new);
        self.at_mut(new).parent = parent;
    }

    fn replace_child(&mut self, parent: u32, old: u32, new: u32) {
        if parent == NIL {
            self.root = new;
        } else if self.at(parent).left == old {
            self.at_mut(parent).left = new;
        } else {
            self.at_mut(parent).right = new;
        }
    }

    fn rotate_left(&mut self, x: u32) {
        let y = self.at(x).right;
        let inner = self.at(y).left;
        self.at_mut(x).right = inner;
        if inner != NIL {
            self.at_mut(inner).parent = x;
        }
        let parent = self.at(x).parent;
        self.at_mut(y).parent = parent;
        self.replace_child(parent, x, y);
        self.at_mut(y).left = x;
        self.at_mut(x).parent = y;
        // y has x and all that was left of x on its left now.
        self.at_mut(y).index += self.at(x).index + 1;
    }

    fn rotate_right(&mut self, x: u32) {
        let y = self.at(x).left;
        let inner = self.at(y).right;
        self.at_mut(x).left = inner;
        if inner != NIL {
            self.at_mut(inner).parent = x;
        }
        let parent = self.at(x).parent;
        self.at_mut(y).parent = parent;
        self.replace_child(parent, x, y);
        self.at_mut(y).right = x;
        self.at_mut(x).parent = y;
        // x has only what was right of y on its left now.
        self.at_mut(x).index -= self.at(y).index + 1;
    }

    fn mend_insertion(&mut self, mut z: u32) {
        while self.at(self.at(z).parent).red {
            let parent = self.at(z).parent;
            let grand = self.at(parent).parent;
            let left = self.at(grand).left == parent;
            let uncle = if left { self.at(grand).right } else { self.at(grand).left };
            if self.at(uncle).red {
                self.at_mut(parent).red = false;
                self.at_mut(uncle).red = false;
                self.at_mut(grand).red = true;
                z = grand;
                continue;
            }
            let inner = if left { self.at(parent).right } else { self.at(parent).left };
            if z == inner {
                z = parent;
                if left { self.rotate_left(z) } else { self.rotate_right(z) }
            }
            let parent = self.at(z).parent;
            self.at_mut(parent).red = false;
            self.at_mut(grand).red = true;
            if left { self.rotate_right(grand) } else { self.rotate_left(grand) }
        }
        let root = self.root;
        self.at_mut(root).red = false;
    }

    fn mend_removal(&mut self, mut x: u32) {
        while x != self.root && !self.at(x).red {
            let parent = self.at(x).parent;
            let left = self.at(parent).left == x;
            let rotate_to = |t: &mut Self, n, to_left| {
                if to_left { t.rotate_left(n) } else { t.rotate_right(n) }
            };
            let sibling_of = |t: &Self| if left { t.at(parent).right } else { t.at(parent).left };
            let mut w = sibling_of(self);
            if self.at(w).red {
                self.at_mut(w).red = false;
                self.at_mut(parent).red = true;
                rotate_to(self, parent, left);
                w = sibling_of(self);
            }
            let (near, far) = if left {
                (self.at(w).left, self.at(w).right)
            } else {
                (self.at(w).right, self.at(w).left)
            };
            if !self.at(near).red && !self.at(far).red {
                self.at_mut(w).red = true;
                x = parent;
                continue;
            }
            if !self.at(far).red {
                self.at_mut(near).red = false;
                self.at_mut(w).red = true;
                rotate_to(self, w, !left);
                w = sibling_of(self);
            }
            self.at_mut(w).red = self.at(parent).red;
            self.at_mut(parent).red = false;
            let far = if left { self.at(w).right } else { self.at(w).left };
            self.at_mut(far).red = false;
            rotate_to(self, parent, left);
            x = self.root;
        }
        self.at_mut(x).red = false;
    }

    /// Whether every rule of the tree holds; for the tests.
    ///
    /// # Errors
    /// The rule that does not.
    #[doc(hidden)]
    pub fn audit(&self) -> Result<(), &'static str>
    where
        K: Debug,
    {
        if self.at(NIL).red || self.at(self.root).red {
            return Err("nil and the root are black");
        }
        let (count, _) = self.audit_below(self.root, NIL)?;
        if count as usize != self.len() {
            return Err("every node is reached once");
        }
        let mut last = None;
        for (_, key) in self.iter() {
            if last.is_some_and(|l| l > key) {
                return Err("keys are in order");
            }
            last = Some(key);
        }
        let first = if self.root == NIL { NIL } else { self.minimum(self.root) };
        if first == self.first { Ok(()) } else { Err("the first node is the leftmost") }
    }

    /// Nodes below and at `n`, and black nodes on each path down.
    fn audit_below(&self, n: u32, parent: u32) -> Result<(u32, u32), &'static str> {
        if n == NIL {
            return Ok((0, 0));
        }
        let s = self.at(n);
        if s.parent != parent || !s.used {
            return Err("a child knows its parent");
        }
        if s.red && self.at(parent).red {
            return Err("a red node has no red child");
        }
        let (l, black_l) = self.audit_below(s.left, n)?;
        let (r, black_r) = self.audit_below(s.right, n)?;
        if black_l != black_r {
            return Err("every path has as many black nodes");
        }
        if s.index != l {
            return Err("the RB index is the size of the left subtree");
        }
        Ok((l + r + 1, black_l + u32::from(!s.red)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Figure 4.4: the run queue of the thesis, with the RB index of its figure 4.5 where the
    /// shape of the tree is given by parents. Ordinates are those of the column ORDER.
    #[test]
    fn ordinates_are_those_of_figure_4_4() {
        let vruntimes = [
            5_556_399_127u64,
            5_556_620_530,
            5_556_792_013,
            5_557_007_206,
            5_557_192_115,
            5_557_198_289,
            5_559_010_627,
            5_560_140_783,
        ];
        // Any order of insertion gives the same ordinates.
        for start in 0..vruntimes.len() {
            let mut tree = RbTree::new();
            let mut nodes = vec![None; vruntimes.len()];
            for k in 0..vruntimes.len() {
                let i = (start + k * 3) % vruntimes.len();
                nodes[i] = Some(tree.insert(vruntimes[i]));
            }
            tree.audit().expect("sound");
            for (order, node) in nodes.into_iter().enumerate() {
                assert_eq!(tree.ordinate(node.expect("inserted")), order);
            }
        }
    }

    #[derive(Debug, Clone)]
    enum Step {
        Insert(u16),
        Remove(usize),
        Reposition(usize, u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            3 => any::<u16>().prop_map(|k| Step::Insert(k % 64)),
            3 => any::<u16>().prop_map(Step::Insert),
            4 => any::<usize>().prop_map(Step::Remove),
            2 => (any::<usize>(), any::<u16>()).prop_map(|(n, k)| Step::Reposition(n, k)),
        ];
        proptest::collection::vec(step, 0..400)
    }

    proptest! {
        #[test]
        fn it_is_a_sorted_list(steps in steps()) {
            let mut tree = RbTree::new();
            // The reference: a plain list, equal keys in the order of their coming.
            let mut list: Vec<(u16, Node)> = Vec::new();
            let put = |list: &mut Vec<(u16, Node)>, k: u16, n: Node| {
                let at = list.partition_point(|(other, _)| *other <= k);
                list.insert(at, (k, n));
            };
            for step in steps {
                match step {
                    Step::Insert(k) => {
                        let n = tree.insert(k);
                        put(&mut list, k, n);
                    }
                    Step::Remove(i) if !list.is_empty() => {
                        let (k, n) = list.remove(i % list.len());
                        prop_assert_eq!(tree.remove(n), k);
                    }
                    Step::Reposition(i, k) if !list.is_empty() => {
                        let (_, n) = list.remove(i % list.len());
                        let n = tree.reposition(n, k);
                        put(&mut list, k, n);
                    }
                    _ => {}
                }
                prop_assert_eq!(tree.audit(), Ok(()));
                prop_assert_eq!(tree.len(), list.len());
                prop_assert_eq!(tree.select(list.len()), None);
                prop_assert_eq!(tree.first(), list.first().map(|(_, n)| *n));
                for (i, (k, n)) in list.iter().enumerate() {
                    prop_assert_eq!(tree.ordinate(*n), i);
                    prop_assert_eq!(tree.select(i), Some(*n));
                    prop_assert_eq!(tree.key(*n), *k);
                    prop_assert_eq!(tree.next(*n), list.get(i + 1).map(|(_, n)| *n));
                }
            }
            let all: Vec<Node> = tree.iter().map(|(n, _)| n).collect();
            prop_assert!(all.iter().enumerate().all(|(i, n)| tree.ordinate_by_walk(*n) == i));
        }
    }
}
