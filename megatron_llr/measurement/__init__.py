"""One measurement over the whole job: owners of the matrices, and the collectives."""
