"""Short programs to copy from: own_data, own_model, own_method, own_figure, own_loop, and the notebook tour.ipynb."""
